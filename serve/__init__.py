"""The vLLM command of a target, a running server, clients of it, and CPU fixes for vLLM."""

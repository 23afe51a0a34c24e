"""The vLLM command of a target, a running server, and the CPU fixes for vLLM."""

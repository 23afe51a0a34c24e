"""Code that vLLM loads into its own processes, on GPUs and CPUs: entry points and a connector.

These modules import nothing of Draftline but `contracts`, so that a checkout on PYTHONPATH is enough for them.
"""

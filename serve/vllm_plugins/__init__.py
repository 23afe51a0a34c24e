"""Code that vLLM loads into its own processes, on GPUs and CPUs: entry points and a connector.

Of Draftline these modules import `contracts` and serve/releases.py alone, which need no package that vLLM lacks: a
checkout on PYTHONPATH is enough for them.
"""

"""Triton's interpreter as a backend named `cpu`, so that vLLM's V2 model runner starts without a GPU. For tests only.

This folder on PYTHONPATH installs it: its entry points are in v2_runner-0.dist-info. vLLM's check for Triton wants a
backend of that name with an active driver, before it loads its plugins.
"""

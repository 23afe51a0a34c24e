"""Utilities that know nothing of LLMs: files, errors, command lines, pages."""

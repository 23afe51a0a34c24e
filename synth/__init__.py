"""Prompts to conversations written by the target."""

"""Generate conversations with the target from prompts."""

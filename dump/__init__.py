"""Conversations to hidden states, aux states and loss masks."""

"""Train a draft from stored hidden states, evaluate it offline, export it."""

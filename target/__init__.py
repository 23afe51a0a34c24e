"""Facts about a target, read from its folder without loading the model."""

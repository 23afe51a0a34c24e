"""Everything known about a target, read from its folder without loading it."""

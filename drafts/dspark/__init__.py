"""DSpark: a block draft with a sequential Markov head and a confidence head."""

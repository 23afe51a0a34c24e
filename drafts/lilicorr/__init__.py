"""LiLiCorr: a block draft whose candidates of all slots attend to each other before one way through them is chosen."""

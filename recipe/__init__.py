"""The recipe: sections of the stages, loading, checks, the `recipe` command."""

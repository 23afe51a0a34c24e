"""Stages as tasks of a scheduler; it runs them as commands."""

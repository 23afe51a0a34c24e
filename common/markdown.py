"""Text for Markdown tables."""

from __future__ import annotations


def to_cell(value: object) -> str:
    """Return a value's text for a cell of a table: on one line, without the sign that ends the cell."""
    return " ".join(str(value).split()).replace("|", "\\|")

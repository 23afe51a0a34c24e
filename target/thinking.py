"""Translate a thinking mode to arguments of the target's chat template."""

from __future__ import annotations

from typing import Any

from target.section import TargetSection


def template_arguments(section: TargetSection, mode: str | None) -> dict[str, Any]:
    """Return the chat template's arguments for a thinking mode: `{}`, or `{variable: value}`.

    A mode without an entry in `target.thinking_mode_values` is passed by its name; a null value passes nothing.
    """
    value = section.thinking_mode_values.get(mode, mode) if mode else None
    return {} if value is None else {section.thinking_mode_name: value}

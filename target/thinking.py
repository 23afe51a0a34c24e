"""Thinking modes of a target: arguments of its chat template for a mode, and the tags around its reasoning."""

from __future__ import annotations

import re
from typing import Any

from target.section import TargetSection
from target.target import Target

CLOSING_TAG = re.compile(r"</([\w:]*think)>|\[/(THINK)\]")
HARMONY = "<|channel|>analysis"
HARMONY_TAGS = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")
"""gpt-oss: reasoning is a message in the channel `analysis`, the answer one in `final`."""


def template_arguments(section: TargetSection, mode: str | None) -> dict[str, Any]:
    """Return the chat template's arguments for a thinking mode: `{}`, or `{variable: value}`.

    A mode without an entry in `target.thinking_mode_values` is passed by its name; a null value passes nothing.
    """
    value = section.thinking_mode_values.get(mode, mode) if mode else None
    return {} if value is None else {section.thinking_mode_name: value}


def find_tags(template: str) -> tuple[str, str] | None:
    """Return the tags around the reasoning in a chat template, as `<think>` and `</think>`; None without any."""
    if HARMONY in template:
        return HARMONY_TAGS
    if found := CLOSING_TAG.search(template):
        closing = found.group()
        return closing.replace("/", "", 1), closing
    return None


def thinking_tags_of(section: TargetSection, target: Target) -> tuple[str, str] | None:
    """Return the tags around the reasoning in a reply: the recipe's, or those in the target's chat template."""
    return section.thinking_tags or find_tags(target.find_chat_template() or "")

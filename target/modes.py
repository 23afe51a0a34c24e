"""Find a target's thinking modes in its chat template: the template's argument, the modes and the argument's values."""

from __future__ import annotations

from dataclasses import dataclass, field

from target.templates import values_of, variables_of

SWITCHES = ("enable_thinking", "thinking")
"""Arguments that are true or false: Qwen3 and GLM; DeepSeek and Granite."""
NAMED = {"thinking_mode": ["enabled", "disabled", "adaptive"], "reasoning_effort": ["low", "medium", "high"]}
"""Arguments that name a mode, and their usual values (MiniMax; gpt-oss)."""
ORDER = ("enable_thinking", "thinking_mode", "reasoning_effort", "thinking")


@dataclass(frozen=True)
class Modes:
    """`name`: the chat template's argument; `values`: what it gets for a mode, where that is not the mode's name."""

    name: str
    modes: list[str]
    values: dict[str, bool] = field(default_factory=dict)


def find_modes(template: str) -> Modes | None:
    """Return the thinking modes of a chat template; None for one without any that are known here."""
    arguments = variables_of(template)
    for name in ORDER:
        if name not in arguments:
            continue
        if name in SWITCHES:
            return Modes(name, ["enabled", "disabled"], {"enabled": True, "disabled": False})
        return Modes(name, _modes_of(template, name))
    return None


def _modes_of(template: str, name: str) -> list[str]:
    """Return the argument's values: those it is compared with, else the usual ones in the template, else all.

    One value alone is only a default.
    """
    quoted = [mode for mode in NAMED[name] if f"'{mode}'" in template or f'"{mode}"' in template]
    return next((modes for modes in (values_of(template, name), quoted) if len(modes) > 1), NAMED[name])

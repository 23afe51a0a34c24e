"""Measure prompts in the target's tokens, rendered with its chat template; most need not be tokenized.

Reads: the target's tokenizer and chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from contracts.prompts import PromptRow, read_text
from recipe.recipe import Recipe
from synth.tool_calls import ERRORS, with_parsed_arguments
from target.target import Target
from target.templates import rendering_template

LONGEST_TOKEN = 256
"""Bytes. Longer tokens are rare (runs of spaces or dashes); a prompt of them is tokenized in vain, no more."""


class PromptLength:
    """Whether a prompt is within the recipe's limits, by the tokens of everything but the replies.

    A token covers at least one byte, so a prompt of fewer bytes than `max_tokens` is short enough, with the template's
    own text counted in. Only other prompts are rendered and tokenized.
    """

    def __init__(self, recipe: Recipe, least: int, most: int | None) -> None:
        """Load the tokenizer. Raises UserError if the target is not here or has no chat template."""
        from transformers import AutoTokenizer

        target = Target.here(recipe.target)
        self._least, self._most = least, most
        self._template = rendering_template(recipe.target, target)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(target.path)
        self.settings = {
            "tokenizer": target.tokenizer_checksum,
            "chat_template": target.template_checksum if target.find_chat_template() else "",
        }
        one = [{"role": "user", "content": "x"}]
        three = [*one, {"role": "assistant", "content": "x"}, *one]
        self._base, more = (len(self._render(messages, None).encode()) for messages in (one, three))
        self._by_message = max(0, more - self._base)  # of two messages: an upper bound for one

    def refuse(self, row: PromptRow) -> str:
        """Return why a prompt is too long or too short, "" if it is neither."""
        size = sum(len(read_text(message).encode(errors="replace")) for message in row.messages)
        bound = size + self._base + len(row.messages) * self._by_message
        is_plain = row.tools is None and not any(message.get("tool_calls") for message in row.messages)
        surely_fits = self._most is None or (bound <= self._most and is_plain)
        if surely_fits and size >= self._least * LONGEST_TOKEN:
            return ""
        try:
            text = self._render(with_parsed_arguments(row.messages), row.tools)
        except (TemplateError, *ERRORS) as error:  # templates check what they get
            return f"the chat template refuses it: {error}"[:200]
        num_tokens = len(self._tokenizer.encode(text, add_special_tokens=False))
        if self._most is not None and num_tokens > self._most:
            return f"{num_tokens} tokens, more than {self._most}"
        return f"{num_tokens} tokens, less than {self._least}" if num_tokens < self._least else ""

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        )


def describe_tools(tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Return tools as text, the same for equal tools."""
    return json.dumps(tools, sort_keys=True, ensure_ascii=False) if tools else ""

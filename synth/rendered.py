"""Token ids where the server gives none: its prompt and reply, rendered and tokenized here.

Reads: the target's tokenizer and chat template. Such ids are a guess at what the server saw, near but not proven; the
records that hold them are marked as rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.target import Target


class Renderer:
    """The target's tokenizer, for servers without `return_token_ids`."""

    def __init__(self, target: Target) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(target.path)
        self._template = target.chat_template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_values: Mapping[str, Any],
        reply: str,
        *,
        ended: bool,
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt (up to the target's turn) and of its reply, the end-of-turn token last if it `ended`."""
        prompt = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
            **template_values,
        )
        prompt_ids, reply_ids = (self._tokenizer.encode(text, add_special_tokens=False) for text in (prompt, reply))
        return prompt_ids, [*reply_ids, self._tokenizer.eos_token_id] if ended else reply_ids

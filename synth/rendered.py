"""Token ids where the server gives none: its prompt and reply, rendered and tokenized here.

Reads: the target's tokenizer and chat template. Such ids are a guess at what the server saw, near but not proven; the
records that hold them are marked as rendered.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

from contracts.recipe import TargetSection
from contracts.target import Target
from contracts.templates import rendering_template

WHOLE = ("stop", "tool_calls")
"""Finish reasons of a reply that the target itself ended."""


class Renderer:
    """The target's tokenizer, for servers without `return_token_ids`; loaded when it is first needed."""

    def __init__(self, section: TargetSection, target: Target) -> None:
        self._section = section
        self._target = target
        self._tokenizer: Any = None
        self._lock = threading.Lock()  # tokenizers are not safe to share between threads

    def render(self, request: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids of a request's prompt, up to the target's turn, and of the reply; if it ended, with its last token."""
        with self._lock:
            if self._tokenizer is None:
                self._load()
            prompt = self._tokenizer.apply_chat_template(
                request["messages"],
                tools=request.get("tools"),
                chat_template=rendering_template(self._section, self._target),
                add_generation_prompt=True,
                tokenize=False,
                **request.get("chat_template_kwargs", {}),
            )
            reply = choice["message"].get("content") or ""
            prompt_ids, reply_ids = (self._tokenizer.encode(text, add_special_tokens=False) for text in (prompt, reply))
        ended = choice["finish_reason"] in WHOLE
        return prompt_ids, [*reply_ids, self._tokenizer.eos_token_id] if ended else reply_ids

    def _load(self) -> None:
        from transformers import AutoTokenizer

        print(
            "\nsynth: the server gives no token ids; its rows are rendered here, which is not token-exact, and marked. "
            "vLLM from 0.10.2 on gives them.",
            file=sys.stderr,
        )
        self._tokenizer = AutoTokenizer.from_pretrained(self._target.path)

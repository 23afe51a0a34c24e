"""Render and tokenize prompt and reply if the server returns no token ids.

Reads: the target's tokenizer and chat template. Such ids may differ from the server's, so their records are marked as
rendered.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

from synth.reply import ENDED
from synth.tool_calls import with_parsed_arguments
from target.section import TargetSection
from target.target import Target
from target.templates import rendering_template


class Renderer:
    """The target's tokenizer, for servers without `return_token_ids`; loaded when first needed."""

    def __init__(self, section: TargetSection, target: Target) -> None:
        self._section = section
        self._target = target
        self._tokenizer: Any = None
        self._lock = threading.Lock()  # tokenizers are not thread-safe

    def render(self, request: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and reply; the end-of-turn token is appended if the reply ended."""
        with self._lock:
            if self._tokenizer is None:
                self._load()
            prompt = self._tokenizer.apply_chat_template(
                with_parsed_arguments(request["messages"]),
                tools=request.get("tools"),
                chat_template=rendering_template(self._section, self._target),
                add_generation_prompt=True,
                tokenize=False,
                **request.get("chat_template_kwargs", {}),
            )
            reply = choice["message"].get("content") or ""
            prompt_ids, reply_ids = (self._tokenizer.encode(text, add_special_tokens=False) for text in (prompt, reply))
        ended = choice["finish_reason"] in ENDED
        return prompt_ids, [*reply_ids, self._tokenizer.eos_token_id] if ended else reply_ids

    def _load(self) -> None:
        from transformers import AutoTokenizer

        print(
            "\nsynth: the server returns no token ids; conversations are rendered here, not token-exact, and marked. "
            "vLLM returns ids since 0.10.2.",
            file=sys.stderr,
        )
        self._tokenizer = AutoTokenizer.from_pretrained(self._target.path)

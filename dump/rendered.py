"""Loss spans of rendered rows, whose token ids are a tokenizer's since their server gave none.

Reads: the target's tokenizer and chat template, or the recipe's training template. Where one tags what the assistant
says (`{% generation %}`), the spans are those tags, rendered in the row's own thinking mode, less what the generation
prompt already holds: the target did not generate that. Rows that render to other ids than they recorded keep their
recorded spans.
"""

from __future__ import annotations

import json
from typing import Any

from contracts.conversation import Conversation, Sample
from contracts.recipe import TargetSection
from contracts.target import Target
from contracts.templates import tagged_template

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class TemplateMasks:
    """Renders rows again; the tokenizer is loaded when the first rendered row comes."""

    def __init__(self, section: TargetSection, target: Target) -> None:
        self._section = section
        self._target = target
        self._tokenizer: Any = None
        self._template: str | None = None
        self.tagged = 0
        self.recorded = 0

    def apply(self, conversation: Conversation) -> list[Sample]:
        """The conversation's samples, those of rendered rows with the template's spans."""
        if not conversation.rendered:
            return conversation.samples
        spans = self._render(conversation)
        return [self._replace(sample, spans) for sample in conversation.samples]

    def tell(self) -> None:
        """Print which masks were taken, if any row was rendered."""
        if self.tagged or self.recorded:
            print(
                f"dump: of the rendered samples {self.tagged} have the spans of the template's generation tags, "
                f"{self.recorded} those that were recorded"
            )

    def _replace(self, sample: Sample, rendered: tuple[list[int], list[tuple[int, int]]] | None) -> Sample:
        num_tokens = len(sample.token_ids)
        if rendered is None or rendered[0][:num_tokens] != sample.token_ids:
            self.recorded += 1
            return sample
        self.tagged += 1
        spans = [(start, min(end, num_tokens)) for start, end in rendered[1] if start < num_tokens]
        return Sample(token_ids=sample.token_ids, loss_spans=spans)

    def _render(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Token ids of the whole conversation, and the spans that the target generated; None without tags."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._template = tagged_template(self._section, self._target)
            self._tokenizer = AutoTokenizer.from_pretrained(self._target.path)
        if self._template is None:
            return None
        messages = [_with_objects(message) for message in conversation.messages or []] or [
            {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in conversation.conversations or []
        ]
        mode = conversation.thinking_mode
        value = self._section.thinking_mode_values.get(mode, mode)
        kwargs = {
            "tools": conversation.tools,
            "chat_template": self._template,
            **({self._section.thinking_mode_name: value} if mode and value is not None else {}),
        }
        whole = self._tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **kwargs
        )
        ids, tagged = list(whole["input_ids"]), list(whole["assistant_masks"])
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._tokenizer.apply_chat_template(
                    messages[:number], add_generation_prompt=True, tokenize=False, **kwargs
                )
                start = end = len(self._tokenizer.encode(prompt, add_special_tokens=False))
                while end < len(ids) and tagged[end]:
                    end += 1
                if end > start:
                    spans.append((start, end))
        return ids, spans


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have objects for arguments, as vLLM hands them to the template."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"].get("arguments")
        parsed = json.loads(arguments or "{}") if arguments is None or isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": parsed}})
    return {**message, "tool_calls": calls}

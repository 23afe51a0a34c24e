"""Loss spans of rendered rows, whose token ids are from a tokenizer because the server returned none.

Reads: the target's tokenizer and chat template, or the recipe's training template.

If the template tags the assistant's text (`{% generation %}`), the spans are the tagged tokens, rendered in the row's
own thinking mode, without the part that the generation prompt already holds. Rows that render to other ids than
recorded keep their recorded spans.
"""

from __future__ import annotations

import json
from typing import Any

from contracts.conversation import Conversation, Sample
from contracts.prompts import SHAREGPT_ROLES
from target.section import TargetSection
from target.target import Target
from target.templates import tagged_template
from target.thinking import template_arguments


class TemplateMasks:
    """Renders rows again; loads the tokenizer at the first rendered row."""

    def __init__(self, section: TargetSection, target: Target) -> None:
        self._section = section
        self._target = target
        self._tokenizer: Any = None
        self._template: str | None = None
        self.tagged = 0
        self.recorded = 0

    def apply(self, conversation: Conversation) -> list[Sample]:
        """Return the conversation's samples; those of a rendered row get the template's spans."""
        if not conversation.rendered:
            return conversation.samples
        spans = self._render(conversation)
        return [self._replace(sample, spans) for sample in conversation.samples]

    def print_counts(self) -> None:
        """Print how many samples got which spans, if any row was rendered."""
        if self.tagged or self.recorded:
            print(
                f"dump: {self.tagged} rendered samples have the spans of the template's generation tags, "
                f"{self.recorded} the recorded spans"
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
        """Return the conversation's token ids and generated spans; None for a template without tags."""
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
        kwargs = {
            "tools": conversation.tools,
            "chat_template": self._template,
            **template_arguments(self._section, conversation.thinking_mode),
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
    """Return a message with the arguments of its tool calls parsed, as vLLM passes them to the template."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"].get("arguments")
        parsed = json.loads(arguments or "{}") if arguments is None or isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": parsed}})
    return {**message, "tool_calls": calls}

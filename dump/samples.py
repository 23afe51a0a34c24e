"""The samples of a synthesis, and the filter that decides which of them are dumped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from contracts.conversation import Conversation, Sample, read_conversations
from dump.rendered import TemplateMasks
from recipe.dump import DumpSection
from recipe.mask import mask_token_of
from recipe.recipe import Recipe
from serve.extraction import longest_sample
from target.target import Target


class Capturable(Protocol):
    """A sample to capture: its id in the store, and the metadata of its file."""

    @property
    def sample_id(self) -> str: ...

    @property
    def sample(self) -> Sample: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """One sample of one conversation, with its id in the store."""

    sample_id: str
    conversation: Conversation
    sample: Sample

    @property
    def num_tokens(self) -> int:
        return len(self.sample.token_ids)

    @property
    def metadata(self) -> dict[str, str]:
        return metadata_of(self.conversation)


def metadata_of(conversation: Conversation) -> dict[str, str]:
    """Return the metadata of the files of a conversation's samples."""
    return {
        "conversation_id": conversation.id,
        "category": conversation.category,
        "thinking_mode": conversation.thinking_mode,
        "finish_reason": conversation.finish_reason,
        "temperature": str(conversation.sampling.get("temperature", "")),
        "sampling": json.dumps(conversation.sampling),
    }


def read_rows(folders: Sequence[Path], masks: TemplateMasks, shard: tuple[int, int] | None = None) -> Iterator[Row]:
    """Yield every sample of the conversations in `folders`, or those of a shard (contracts/shards.py)."""
    for folder in folders:
        for conversation in read_conversations(folder, shard):
            for number, sample in enumerate(masks.apply(conversation)):
                yield Row(f"{conversation.id}-{number}", conversation, sample)


@dataclass(frozen=True)
class Verdict:
    """The filter's answer: the `row` to capture, or the status and reason of its ledger line."""

    row: Row | None
    status: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Filter:
    """Decides which samples are captured. `mask_token` is the draft's; None if its method has none."""

    section: DumpSection
    max_tokens: int
    mask_token: int | None

    @classmethod
    def of(cls, recipe: Recipe, target: Target) -> Filter:
        return cls(recipe.dump, longest_sample(recipe, target), mask_token_of(recipe, target))

    def judge(self, row: Row) -> Verdict:
        """Return the row to capture, cut to `max_tokens` if the recipe allows it, or why it is left out."""
        if row.conversation.finish_reason == "length" and not self.section.include_truncated:
            return Verdict(None, "truncated", "a reply reached max_tokens")
        if row.conversation.loop is not None and not self.section.include_loops:
            return Verdict(None, "filtered", "a reply fell into a loop")
        if row.num_tokens > self.max_tokens and not self.section.truncate:
            return Verdict(None, "filtered", f"{row.num_tokens} tokens, more than {self.max_tokens}")
        sample = cut_sample(row.sample, self.max_tokens)
        if not sample.loss_spans:
            return Verdict(None, "filtered", "no supervised token")
        if self.mask_token is not None and self.mask_token in sample.token_ids:
            return Verdict(None, "filtered", f"contains the mask token {self.mask_token}, which must never occur")
        return Verdict(Row(row.sample_id, row.conversation, sample))


def cut_sample(sample: Sample, max_tokens: int) -> Sample:
    """Return the sample's first `max_tokens` tokens, with the loss spans among them."""
    if len(sample.token_ids) <= max_tokens:
        return sample
    spans = [(start, min(end, max_tokens)) for start, end in sample.loss_spans if start < max_tokens]
    return Sample(token_ids=sample.token_ids[:max_tokens], loss_spans=spans)

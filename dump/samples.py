"""The samples of a conversations file: which of them are dumped, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from contracts.conversation import Conversation, Sample, read_conversations
from contracts.recipe import DumpSection
from dump.rendered import TemplateMasks


@dataclass(frozen=True)
class Row:
    """One sample of one conversation, under the id that its file in the store has."""

    sample_id: str
    conversation: Conversation
    sample: Sample

    @property
    def num_tokens(self) -> int:
        return len(self.sample.token_ids)


def read_rows(folders: Sequence[Path], masks: TemplateMasks, shard: tuple[int, int] | None = None) -> Iterator[Row]:
    """Yield every sample of the conversations in `folders`, or those of a shard (contracts/shards.py)."""
    for folder in folders:
        for conversation in read_conversations(folder, shard):
            for number, sample in enumerate(masks.apply(conversation)):
                yield Row(f"{conversation.id}-{number}", conversation, sample)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a row: `row` to be captured, or a status and the reason that its ledger line has."""

    row: Row | None
    status: str = ""
    reason: str = ""


def judge(section: DumpSection, row: Row, max_tokens: int) -> Verdict:
    """Whether a sample is captured, whole or cut to `max_tokens`."""
    conversation, sample = row.conversation, row.sample
    if conversation.finish_reason == "length" and not section.include_truncated:
        return Verdict(None, "truncated", "a reply reached max_tokens")
    if conversation.loop is not None and not section.include_loops:
        return Verdict(None, "filtered", "a reply fell into a loop")
    if row.num_tokens > max_tokens:
        if not section.truncate:
            return Verdict(None, "filtered", f"{row.num_tokens} tokens, more than {max_tokens}")
        spans = [(start, min(end, max_tokens)) for start, end in sample.loss_spans if start < max_tokens]
        sample = Sample(token_ids=sample.token_ids[:max_tokens], loss_spans=spans)
    if not sample.loss_spans:
        return Verdict(None, "filtered", "no supervised token")
    return Verdict(Row(row.sample_id, conversation, sample))

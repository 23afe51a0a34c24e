"""The conversation record, one JSON object per line, which `synth` writes and `dump` and `bench` read.

A *sample* is a sequence of token ids as the target's server reported them, with the spans that the target generated:
`token_ids[start:end]` is supervised for each `[start, end)` in `loss_spans`, in exactly the context in which it was
generated. A template that only appends gives one sample per conversation. A template that rewrites history gives one
more for each rewritten turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from common.errors import UserError
from common.files import hash_json, parse_line, read_json, read_lines
from contracts.ledger import read_entries
from contracts.run import read_run
from contracts.shards import folders_by_count, folders_of_others, shard_folder, shard_of
from contracts.target_identity import TargetIdentity

CONVERSATIONS_FILE = "conversations.jsonl"
WHAT = "conversations written by `synth generate`"
LEADING_ID = re.compile(rb'\{"id":"([0-9a-f]{32})"')
NO_PENALTIES: dict[str, float] = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NO_FILTERS: dict[str, float | int] = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
"""A record's sampling parameters besides the temperature, with the values that leave the distribution unchanged. -1
turns top_k off in vLLM and SGLang; 0 only in vLLM."""


class Sample(BaseModel):
    """Token ids, and the half-open spans that the target generated."""

    model_config = ConfigDict(extra="forbid")

    token_ids: list[int]
    loss_spans: list[tuple[int, int]]

    @model_validator(mode="after")
    def _spans_are_inside_and_in_order(self) -> Sample:
        previous = 0
        for start, end in self.loss_spans:
            if not previous <= start < end <= len(self.token_ids):
                raise ValueError(f"loss span [{start}, {end}) is empty, out of order or outside the tokens")
            previous = end
        return self


class Loop(BaseModel):
    """A reply that repeats itself: `num_tokens` tokens of turn `turn` (from 0) repeat with period `period`."""

    model_config = ConfigDict(extra="forbid")

    turn: int
    period: int
    num_tokens: int


class Conversation(BaseModel):
    """One conversation that the target generated. Unknown keys are errors.

    `finish_reason`: of the last reply ("length": it was cut). `stopped`: why the conversation ended before its source.
    `rendered`: the server returned no token ids, so the tokenizer computed them. Turns are in `messages` (OpenAI) or
    `conversations` (ShareGPT).
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    source_id: str
    index: int
    sample: int = 0
    category: str = ""
    messages: list[dict[str, Any]] | None = None
    conversations: list[dict[str, str]] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking_mode: str = ""
    samples: list[Sample]
    finish_reason: Literal["stop", "length"]
    stopped: str = ""
    loop: Loop | None = None
    rendered: bool = False
    sampling: dict[str, Any]
    target: dict[str, str]
    template: str
    usage: dict[str, int]


def make_conversation_id(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking_mode: str,
    sample_number: int = 0,
) -> str:
    """Return the content hash of the prompt side, 32 hex digits, the same on every machine and resume."""
    return hash_json([list(messages), list(tools) if tools else None, thinking_mode, sample_number])[:32]


def check_written_by(folder: Path, target: TargetIdentity) -> dict[str, Any]:
    """Return a synthesis's run state. Raises UserError if it is unfinished or of another target."""
    state = read_run(folder, "synth generate")
    if state["inputs"]["target"] != target.fingerprint:
        raise UserError(
            folder,
            found=f"conversations of target {state['inputs']['target'][:12]}",
            expected=f"those of {target.fingerprint[:12]} ({target.path})",
            fix="Give the conversations that this target generated, or generate them again.",
        )
    return state


def find_part(folder: Path, shard: tuple[int, int] | None) -> list[Path]:
    """Return the folders of a shard's conversations: its own, or `folder` if the synthesis has another shard count.

    A shard's own folder can be read as soon as that shard is finished; the folders of earlier generations follow it.
    Raises UserError while a shard of another generation is being written.
    """
    if shard is None or list(folders_by_count(folder))[-1:] != [shard[1]]:
        return [folder]
    return [shard_folder(folder, *shard), *folders_of_others(folder, shard[1])]


def read_conversations(folder_or_file: Path, shard: tuple[int, int] | None = None) -> Iterator[Conversation]:
    """Yield the records of a `synth` output folder or of one JSONL file, or only those of `shard`.

    Raises UserError for a line that is not a record.
    """
    path = folder_or_file / CONVERSATIONS_FILE if folder_or_file.is_dir() else folder_or_file
    for where, line in _read_records(path, shard):
        yield parse_conversation(line, where)


def parse_conversation(line: bytes, where: str) -> Conversation:
    """Return a line's record. Raises UserError for a line that is none."""
    value = parse_line(line, where, WHAT)
    try:
        return Conversation.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the record"
        raise UserError(
            where,
            found=f"{place}: {first['msg']}",
            expected="a conversation record",
            fix="See docs/formats.md, or run `synth generate` again.",
        ) from None


def hash_conversations(folders: Sequence[Path], shard: tuple[int, int] | None = None) -> str:
    """Return a checksum of records that does not depend on their order or files.

    It is the sum of the lines' sha256 modulo 2^256, as hex: the checksums of all shards add up to that of the whole.
    """
    lines = (line for folder in folders for _, line in _read_records(folder / CONVERSATIONS_FILE, shard))
    return add_checksums(hashlib.sha256(line).hexdigest() for line in lines)


def add_checksums(checksums: Iterable[str]) -> str:
    """Return the checksum of all records from the checksums of their parts."""
    return f"{sum(int(checksum, 16) for checksum in checksums) % 2**256:064x}"


def _read_records(path: Path, shard: tuple[int, int] | None) -> Iterator[tuple[str, bytes]]:
    """Yield `(place, line)` of records; other shards' lines are not parsed, since the id is first."""
    last, end = _accounted_bytes(path.parent), 0
    for number, line in read_lines(path, WHAT):
        where, end = f"{path}:{number}", end + len(line)
        if last is not None and end > last:
            return
        if shard is not None:
            match = LEADING_ID.match(line)
            id_ = match[1].decode() if match else parse_line(line, where, WHAT)["id"]
            if shard_of(id_, shard[1]) != shard[0]:
                continue
        yield where, line


def _accounted_bytes(folder: Path) -> int | None:
    """Return how many bytes of an unfinished run's records its ledger covers; None if the run is finished."""
    state, ledger = folder / "run.json", folder / "ledger.jsonl"
    if not (state.exists() and ledger.exists()) or read_json(state, "a run's state")["complete"]:
        return None
    return max((int(entry.get("end", 0)) for entry in read_entries(ledger)), default=0)

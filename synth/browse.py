"""Write a page to look through the conversations of a run, and the rows that have none.

Reads:  RUN/ledger.jsonl, conversations.jsonl, or those of its shards; finished or not; and the target's tokenizer.
Writes: one HTML file (target/browse.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.progress import track
from contracts.conversation import CONVERSATIONS_FILE, Conversation, parse_conversation
from contracts.ledger import read_entries
from contracts.shards import folders_by_count
from synth.output import LEDGER_FILE
from target.browse import Browser, Part, Row, spread

Entry = tuple[Path, Mapping[str, Any]]
"""The folder of a ledger, and one of its lines."""


def browse(folder: Path, output: Path, limit: int | None, target: Path | None) -> None:
    """Write a page of a run's rows, at most `limit` of them, spread evenly.

    `target`: its folder, if it has moved. Raises UserError for a folder without a ledger, or if a record is broken.
    """
    entries = list_entries(folder)
    chosen = spread(entries, limit)
    written = next((entry for entry in chosen if "end" in entry[1]), None)
    if target is None and written is not None:
        target = Path(read_record(*written).target["path"])
    browser = Browser(f"synth: {folder}", "conversations", target)
    for entry in track(chosen, "browse", "row"):
        browser.add(make_row(read_record(*entry), entry[1]) if "end" in entry[1] else _make_empty_row(entry[1]))
    browser.write(output)
    print(f"synth: {len(chosen)} of {len(entries)} rows -> {output} ({output.stat().st_size / 1e6:.1f} MB)")


def list_entries(folder: Path) -> list[Entry]:
    """Return the last line of each row, in the order of the input; of all shards, if they are not merged.

    Raises UserError if there is no ledger.
    """
    folders = [folder, *(path for paths in folders_by_count(folder).values() for path in paths)]
    folders = [path for path in folders if (path / LEDGER_FILE).exists()]
    if not folders:
        raise UserError(
            folder, found=f"no {LEDGER_FILE}", expected="the output of `synth generate`", fix="Correct the folder."
        )
    if folders[0] == folder:  # merged, or without shards
        folders = folders[:1]
    last = {
        (line["index"], line["sample"]): (path, line) for path in folders for line in read_entries(path / LEDGER_FILE)
    }
    return [last[place] for place in sorted(last)]


def read_record(folder: Path, entry: Mapping[str, Any]) -> Conversation:
    """Read the conversation of a ledger line alone. Raises UserError if it is broken."""
    path = folder / CONVERSATIONS_FILE
    with path.open("rb") as file:
        file.seek(entry["end"] - entry["size"])
        return parse_conversation(file.read(entry["size"]), f"{path} ({entry['id']})")


def make_row(conversation: Conversation, entry: Mapping[str, Any]) -> Row:
    """Return a conversation as a row of the page."""
    several = len(conversation.samples) > 1
    parts = [
        Part(f"sample {number}" if several else "", sample.token_ids, sample.loss_spans)
        for number, sample in enumerate(conversation.samples)
    ]
    facets = {
        "status": entry["status"],
        "thinking mode": conversation.thinking_mode,
        "category": conversation.category,
        "finish reason": conversation.finish_reason,
        "loop": "yes" if conversation.loop else "no",
        "token ids": "rendered, not the server's" if conversation.rendered else "the server's",
    }
    loop = conversation.loop
    facts = {
        "source": conversation.source_id,
        "place": f"row {conversation.index}, sample {conversation.sample}",
        "stopped": conversation.stopped,
        "repeats": f"turn {loop.turn}: {loop.num_tokens} tokens with period {loop.period}" if loop else "",
        "generated": f"{conversation.usage['completion_tokens']} tokens",
        "sampling": ", ".join(f"{key} {value}" for key, value in conversation.sampling.items()),
    }
    facts = {key: value for key, value in facts.items() if value}
    return Row(conversation.id, conversation.source_id, facets, facts, parts)


def _make_empty_row(entry: Mapping[str, Any]) -> Row:
    """Return a row that has no conversation."""
    facts = {key: str(entry[key]) for key in ("reason", "where") if key in entry}
    facts["place"] = f"row {entry['index']}, sample {entry['sample']}"
    return Row(entry["id"], str(entry.get("source", entry["id"])), {"status": entry["status"]}, facts)

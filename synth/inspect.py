"""Show the tokens of one conversation, with those in the loss coloured.

Reads: RUN/conversations.jsonl and the tokenizer of the target that wrote it. Writes: the terminal, or one HTML file.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from contracts.conversation import CONVERSATIONS_FILE, Conversation, Sample
from contracts.ledger import read_entries
from synth.output import LEDGER_FILE
from target.view import Decoder, print_tokens, write_html


def inspect_conversation(folder: Path, id_: str, html: Path | None) -> None:
    """Show the conversation of an id, id prefix or source id. Raises UserError unless one matches."""
    conversation = find_conversation(folder, id_)
    decoder = Decoder(Path(conversation.target["path"]))
    parts = {
        f"sample {number}": list(decoder.split(sample.token_ids, _is_supervised(sample)))
        for number, sample in enumerate(conversation.samples)
    }
    facts = {
        "source": conversation.source_id,
        "row": f"{conversation.index}, sample {conversation.sample}",
        "thinking mode": conversation.thinking_mode or "none sent",
        "finish reason": conversation.finish_reason,
        "stopped": conversation.stopped,
        "loop": conversation.loop.model_dump_json() if conversation.loop else "",
        "token ids": "rendered, not the server's" if conversation.rendered else "the server's",
        "sampling": ", ".join(f"{key} {value}" for key, value in conversation.sampling.items()),
        "tokens": f"{conversation.usage['completion_tokens']} generated",
    }
    facts = {key: value for key, value in facts.items() if value}
    title = f"conversation {conversation.id}"
    if html is not None:
        write_html(html, title, facts, parts)
        print(f"synth: {html}")
        return
    print(title)
    for key, value in facts.items():
        print(f"  {key}: {value}")
    for name, pieces in parts.items():
        print_tokens(name, pieces)


def _is_supervised(sample: Sample) -> list[bool]:
    supervised = [False] * len(sample.token_ids)
    for start, end in sample.loss_spans:
        supervised[start:end] = [True] * (end - start)
    return supervised


def find_conversation(folder: Path, id_: str) -> Conversation:
    """Find a record with the ledger and read only that one. Raises UserError unless exactly one matches."""
    if not (folder / LEDGER_FILE).exists():
        raise UserError(
            folder, found=f"no {LEDGER_FILE}", expected="the output of `synth generate`", fix="Correct the folder."
        )
    found = {}
    for entry in read_entries(folder / LEDGER_FILE):
        if entry["id"].startswith(id_) or entry.get("source") == id_:
            found[entry["id"]] = entry
    written = [entry for entry in found.values() if "end" in entry]
    exact = [entry for entry in written if entry["id"] == id_]
    if len(exact or written) == 1:
        entry = (exact or written)[0]
        with (folder / CONVERSATIONS_FILE).open("rb") as file:
            file.seek(entry["end"] - entry["size"])
            return Conversation.model_validate_json(file.read(entry["size"]))
    if found and not written:
        entry = next(iter(found.values()))
        what = f"a row that is {entry['status']} ({entry.get('reason', '')})"
    else:
        what = f"{len(written)} conversations" + "".join(f", {entry['id']}" for entry in written[:5])
    raise UserError(
        f"{folder} ({id_})", found=what, expected="one conversation", fix="Give its id, or more of its beginning."
    )

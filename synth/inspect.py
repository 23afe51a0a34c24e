"""Show one conversation as the draft will learn it: every token of every sample, the supervised ones coloured.

Reads: RUN/conversations.jsonl and the tokenizer of the target that wrote it. Writes: the terminal, or one HTML file.
"""

from __future__ import annotations

import html as html_module
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from contracts.conversation import CONVERSATIONS_FILE, Conversation, Sample
from contracts.errors import UserError
from contracts.ledger import read_entries
from synth.output import LEDGER_FILE

STYLE = """
body { font: 14px/1.6 ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; white-space: pre-wrap; }
h1, h2, p { font-family: system-ui; white-space: normal; } h1 { font-size: 1.2rem; } h2 { font-size: 1rem; }
.context { color: #777; } .supervised { background: #c8f0cf; } .supervised.odd { background: #9fe0ad; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; }
 .supervised { background: #14532d; } .supervised.odd { background: #1d7a42; } }
"""


def inspect_conversation(folder: Path, id_: str, html: Path | None) -> None:
    """Show the conversation of that id, that beginning of an id, or that source id. Raises UserError for none."""
    conversation = find_conversation(folder, id_)
    decode = _make_decoder(Path(conversation.target["path"]))
    pieces = [list(_split(sample, decode)) for sample in conversation.samples]
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
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(_to_html(conversation.id, facts, pieces), encoding="utf-8")
        print(f"synth: {html}")
        return
    _print(conversation.id, facts, pieces)


def find_conversation(folder: Path, id_: str) -> Conversation:
    """Find a record by the ledger, without reading the others. Raises UserError for none or several."""
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


Piece = tuple[str, bool, list[int]]
"""Text, whether it is supervised, and the ids of its tokens."""


def _split(sample: Sample, decode: Decoder) -> Iterator[Piece]:
    """The sample token by token; tokens that only together make characters come together."""
    supervised = [False] * len(sample.token_ids)
    for start, end in sample.loss_spans:
        supervised[start:end] = [True] * (end - start)
    pending: list[int] = []
    for place, token_id in enumerate(sample.token_ids):
        pending.append(token_id)
        text = decode(pending)
        last = place + 1 == len(supervised) or supervised[place + 1] != supervised[place]
        if not text.endswith("\ufffd") or last or len(pending) >= 8:
            yield text, supervised[place], pending
            pending = []


class Decoder:
    """The target's tokenizer, without transformers: an inspection should not take seconds to start."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def _make_decoder(target: Path) -> Decoder:
    if not (target / "tokenizer.json").exists():
        raise UserError(
            target, found="no tokenizer.json", expected="the target's folder", fix="Bring the target back to its place."
        )
    return Decoder(target / "tokenizer.json")


def _print(id_: str, facts: dict[str, str], pieces: list[list[Piece]]) -> None:
    colour = sys.stdout.isatty()
    print(f"conversation {id_}")
    for key, value in facts.items():
        print(f"  {key}: {value}")
    for number, sample in enumerate(pieces):
        count = sum(len(ids) for _, supervised, ids in sample if supervised)
        total = sum(len(ids) for _, _, ids in sample)
        print(f"\nsample {number}: {total} tokens, {count} supervised ({'green' if colour else 'between « and »'})\n")
        for supervised, group in itertools.groupby(sample, key=lambda piece: piece[1]):
            text = "".join(piece[0] for piece in group)
            if colour:
                print(typer.style(text, fg="green" if supervised else "bright_black"), end="")
            else:
                print(f"«{text}»" if supervised else text, end="")
        print()


def _to_html(id_: str, facts: dict[str, str], pieces: list[list[Piece]]) -> str:
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{id_}</title><style>{STYLE}</style><h1>Conversation {id_}</h1>"
    ]
    parts += [f"<p>{key}: {html_module.escape(value)}</p>" for key, value in facts.items()]
    for number, sample in enumerate(pieces):
        parts.append(f"<h2>Sample {number}</h2><div>")
        place = 0
        for odd, (text, supervised, ids) in enumerate(sample):
            kind = ("supervised odd" if odd % 2 else "supervised") if supervised else "context"
            title = f"{place}: {' '.join(map(str, ids))}"
            parts.append(f'<span class="{kind}" title="{title}">{html_module.escape(text)}</span>')
            place += len(ids)
        parts.append("</div>")
    return "".join(parts) + "\n"

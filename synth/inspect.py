"""Show the tokens of one conversation, with those in the loss coloured.

Reads:  what `synth browse` reads.
Writes: the terminal, or one HTML file.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from synth.browse import Entry, list_entries, make_row, read_record
from target.browse import Browser
from target.view import Decoder, print_tokens, supervised_of


def inspect_conversation(folder: Path, id_: str, html: Path | None) -> None:
    """Show the conversation of an id, id prefix or source id. Raises UserError unless one matches."""
    entry = find_entry(folder, id_)
    conversation = read_record(*entry)
    target, row = Path(conversation.target["path"]), make_row(conversation, entry[1])
    title = f"conversation {conversation.id}"
    if html is not None:
        browser = Browser(title, "conversations", target)
        browser.add(row)
        browser.write(html)
        print(f"synth: {html}")
        return
    print(title)
    for key, value in {**row.facets, **row.facts}.items():
        print(f"  {key}: {value}")
    decoder = Decoder(target)
    for part in row.parts:
        print_tokens(
            part.name or "tokens", list(decoder.split(part.token_ids, supervised_of(len(part.token_ids), part.spans)))
        )


def find_entry(folder: Path, id_: str) -> Entry:
    """Find a record in the ledger. Raises UserError unless exactly one matches."""
    entries = list_entries(folder)
    found = [entry for entry in entries if entry[1]["id"].startswith(id_) or entry[1].get("source") == id_]
    written = [entry for entry in found if "end" in entry[1]]
    exact = [entry for entry in written if entry[1]["id"] == id_]
    if len(exact or written) == 1:
        return (exact or written)[0]
    if found and not written:
        line = found[0][1]
        what = f"a row that is {line['status']} ({line.get('reason', '')})"
    else:
        what = f"{len(written)} conversations" + "".join(f", {line['id']}" for _, line in written[:5])
    raise UserError(
        f"{folder} ({id_})", found=what, expected="one conversation", fix="Give its id, or more of its beginning."
    )

"""Join the shards of a run into one output, with rows in the order of the input.

Reads:  RUN/shards/<i>-of-<n>/ of every i, each finished; and the finished rows of shards of an earlier count.
Writes: RUN/conversations.jsonl, ledger.jsonl, rejects.jsonl, run.json, as a run without shards would.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from tqdm import tqdm

from common.errors import UserError
from common.files import read_json
from contracts.conversation import CONVERSATIONS_FILE
from contracts.ledger import STATUSES, check_counts, parse_entry
from contracts.run import Run, read_run
from contracts.shards import folders_by_count, shard_folder
from recipe.recipe import Recipe
from synth.generate import STAGE, describe
from synth.output import FLAGS, LEDGER_FILE, write_rejects

MAX_OPEN_FILES = 64


def merge(folder: Path) -> dict[str, Any]:
    """Merge the shards of `folder`; return the summary.

    Raises UserError if a shard is missing, unfinished, or of other settings or inputs, and IncompleteError if the
    counts do not add up to the input.
    """
    earlier, shards = find_shards(folder)
    states = [read_run(shard, STAGE) for shard in shards]
    before = [read_json(shard / "run.json", "a shard's state") for shard in earlier]
    for shard, state in zip([*shards, *earlier], [*states, *before], strict=True):
        _check_same(shard, state, states[0])
    num_expected = states[0]["summary"]["places"]  # of the whole input
    shards = [*earlier, *shards]  # the last line of a place counts, so the latest shards come last
    settings = {key: value for key, value in states[0]["settings"].items() if key != "shard"}
    recipe = Recipe.model_validate(yaml.safe_load((shards[0] / "resolved.yaml").read_text()))
    run = Run.open(folder, STAGE, settings=settings, inputs=states[0]["inputs"], recipe_yaml=recipe.to_yaml())
    ledgers = [(shard / LEDGER_FILE).stat().st_size for shard in shards]  # they only grow
    if run.complete and run.state["summary"]["shard_ledgers"] == ledgers:
        print(f"synth: {folder} is merged, skipped ({describe(run.state['summary'])})")
        return dict(run.state["summary"])
    run.reopen()
    counts, flags, tokens = _copy_all(shards, folder)
    unreached = sum(state["summary"].get("unreached", 0) for state in states)
    check_counts(folder / LEDGER_FILE, counts, num_expected - unreached)
    summary = {
        **counts,
        "input": num_expected,
        "rows": states[0]["summary"]["rows"],
        "places": num_expected,
        "tokens": tokens,
        "shards": len(shards),
        "shard_ledgers": ledgers,
        "shard_seconds": round(sum(state["seconds"] for state in (*before, *states)), 1),
        **flags,
        **{key: states[0]["summary"][key] for key in ("demand",) if key in states[0]["summary"]},
        **({"unreached": unreached} if unreached else {}),
    }
    write_rejects(folder)
    run.finish(summary)
    print(f"synth: merged {len(shards)} shards, {describe(summary)} -> {folder / CONVERSATIONS_FILE}")
    return summary


def find_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the shard folders of earlier counts, and those of the latest count in order.

    Raises UserError if there are none, or if one of the latest count is missing.
    """
    found = folders_by_count(folder)
    if not found:
        raise UserError(
            folder / "shards", found="no shards", expected="some", fix="Write them with `synth generate --shard I/N`."
        )
    total = list(found)[-1]
    names = [shard_folder(folder, number, total) for number in range(total)]
    if missing := [path.name for path in names if path not in found[total]]:
        raise UserError(
            folder / "shards",
            found=f"{total - len(missing)} of {total} shards, {missing[0]} not among them",
            expected="all of them",
            fix=f"Run `synth generate --shard {int(missing[0][:5])}/{total}` with the others' flags.",
        )
    return [path for count, paths in found.items() if count != total for path in paths], names


def _check_same(shard: Path, state: dict[str, Any], first: dict[str, Any]) -> None:
    for part in ("settings", "inputs"):
        for key in sorted({*state[part], *first[part]} - {"shard"}):
            if state[part].get(key) != first[part].get(key):
                raise UserError(
                    f"{shard} ({part}.{key})",
                    found=str(state[part].get(key)),
                    expected=f"{first[part].get(key)} as in the first shard",
                    fix="Write all shards with the same recipe and prompts.",
                )
    if state["summary"].get("failed"):
        print(f"synth: {shard.name} has {state['summary']['failed']} failed rows; --retry-failed tries them again")


def _copy_all(shards: list[Path], folder: Path) -> tuple[dict[str, int], Counter[str], int]:
    """Copy records and ledger lines in the order of the input; return counts by status, flags and tokens."""
    order = _index(shards)
    counts: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    end = tokens = 0
    targets = [folder / CONVERSATIONS_FILE, folder / LEDGER_FILE]
    temporaries = [path.with_name(f".{path.name}.tmp") for path in targets]
    with temporaries[0].open("wb") as out, temporaries[1].open("wb") as ledger, OpenFiles() as files:
        for place in tqdm(order, desc="merge", unit="conv", disable=None):
            shard, offset = shards[int(place[2])], int(place[3])
            line = files.at(shard / LEDGER_FILE, offset).readline()
            entry = parse_entry(line, f"{shard / LEDGER_FILE}, byte {offset}")
            if "end" in entry:
                out.write(_read_record(files, shard / CONVERSATIONS_FILE, entry))
                end += entry["size"]
                entry["end"] = end
            ledger.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            counts[entry["status"]] += 1
            flags.update(flag for flag in FLAGS if entry.get(flag))
            tokens += entry.get("tokens", 0)
        for file in (out, ledger):
            file.flush()
            os.fsync(file.fileno())
    for temporary, path in zip(temporaries, targets, strict=True):
        temporary.rename(path)
    return {status: counts[status] for status in STATUSES}, flags, tokens


class OpenFiles:
    """Files open for reading, limited to the most recently used ones; use as a context manager."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def at(self, path: Path, offset: int) -> BinaryIO:
        """Return the file, positioned at `offset`; close the least recently used one if needed."""
        if path not in self._files:
            if len(self._files) == self._limit:
                self._files.popitem(last=False)[1].close()
            self._files[path] = path.open("rb")
        self._files.move_to_end(path)
        self._files[path].seek(offset)
        return self._files[path]


def _read_record(files: OpenFiles, path: Path, entry: dict[str, Any]) -> bytes:
    """Return the record of a ledger entry. Raises UserError if the file does not hold all of it."""
    line = files.at(path, entry["end"] - entry["size"]).read(entry["size"])
    if len(line) != entry["size"] or not line.endswith(b"\n"):
        raise UserError(
            path,
            found=f"no whole record before byte {entry['end']}",
            expected=f"the record of {entry['id']} in the ledger",
            fix="Restore the file from a copy, or delete the shard's folder and write it again.",
        )
    return line


def _index(shards: list[Path]) -> np.ndarray:
    """Return (places, 4) int64: index, sample, shard, offset of the last ledger line; sorted by index and sample."""
    table = array("q")
    for number, shard in enumerate(shards):
        offset = 0
        with (shard / LEDGER_FILE).open("rb") as file:
            for line in file:
                entry = parse_entry(line, f"{shard / LEDGER_FILE}, byte {offset}")
                table.extend((entry["index"], entry["sample"], number, offset))
                offset += len(line)
    rows = np.frombuffer(table, dtype=np.int64).reshape(-1, 4)
    rows = rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 1], rows[:, 0]))]
    last = np.append((np.diff(rows[:, :2], axis=0) != 0).any(axis=1), True)  # a retry's line wins
    return rows[last]

"""Claims about counting a ledger as it grows: every line once, whatever else happens to the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from contracts.ledger import LedgerWriter
from contracts.tally import MAX_REASONS, OTHER_REASONS, LedgerTally, count_reason

ID = "{:032x}"


def write(path: Path, *rows: tuple[int, str]) -> None:
    writer = LedgerWriter(path)
    list(writer.read())
    writer.append({"id": ID.format(number), "status": status, "reason": "why"} for number, status in rows)
    writer.close()


def look(tally: LedgerTally) -> dict[str, int]:
    tally.update()
    return dict(tally.counts)


def test_a_look_reads_only_what_was_appended_since_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    tally = LedgerTally(path)
    assert look(tally) == {}
    write(path, (1, "done"), (2, "truncated"))
    assert look(tally) == {"done": 1, "truncated": 1}
    with path.open("r+b") as file:  # what was read is not read again: it could be anything now
        file.write(b"x" * (path.stat().st_size - 1))
    with path.open("ab") as file:
        file.write(b'{"id": "3", "status": "done"}\n')
    assert look(tally) == {"done": 2, "truncated": 1}
    assert tally.problem == ""


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"id": "1", "status": "done"}\n{"id": "2", "sta')
    tally = LedgerTally(path)
    assert look(tally) == {"done": 1}
    write(path, (2, "filtered"))  # the next writer cuts the torn line off
    assert look(tally) == {"done": 1, "filtered": 1}
    assert tally.problem == ""


def test_a_ledger_that_was_replaced_or_removed_is_counted_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger.jsonl", tmp_path / "other"
    write(path, (1, "failed"), (2, "done"))
    tally = LedgerTally(path)
    assert look(tally) == {"failed": 1, "done": 1}
    write(other, (3, "done"), (4, "done"), (5, "done"))
    other.replace(path)
    assert look(tally) == {"done": 3}
    assert not tally.failed
    path.unlink()
    assert look(tally) == {}


def test_a_retried_row_counts_once_also_when_a_later_shard_made_it_good(tmp_path: Path) -> None:
    failed: dict[object, tuple[LedgerTally, str, str]] = {}
    first, second = (LedgerTally(tmp_path / name, failed) for name in ("first", "second"))
    write(tmp_path / "first", (1, "failed"), (2, "failed"), (1, "done"))
    assert look(first) == {"failed": 1, "done": 1}
    write(tmp_path / "second", (2, "done"))
    assert look(second) == {"done": 1}
    assert (dict(first.counts), failed) == ({"done": 1}, {})


def test_broken_lines_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [
        '{"id": "1", "status": "done"}',
        "no JSON",
        "[1]",
        '{"id": 2, "status": "done"}',
        '{"id": "3", "status": "x"}',
    ]
    path.write_text("\n".join([*lines, '{"id": "6", "status": "done"}']) + "\n")
    tally = LedgerTally(path)
    assert look(tally) == {"done": 2}
    assert tally.problem == "line 2 is broken"


def test_written_rows_are_counted_by_the_shard_of_the_next_stage(tmp_path: Path) -> None:
    write(tmp_path / "ledger", (1, "done"), (2, "truncated"), (4, "done"), (3, "failed"), (5, "filtered"))
    tally = LedgerTally(tmp_path / "ledger", num_shards=2)
    tally.update()
    assert tally.by_shard == {0: 2, 1: 1}


def test_reasons_that_differ_in_numbers_add_up_and_are_limited(tmp_path: Path) -> None:
    reasons: Counter[str] = Counter()
    assert {count_reason(reasons, f"as row {number}") for number in range(5)} == {"as row N"}
    for number in range(2 * MAX_REASONS):
        count_reason(reasons, "a" * number)
    assert len(reasons) == MAX_REASONS + 1
    assert reasons[OTHER_REASONS] == MAX_REASONS + 1

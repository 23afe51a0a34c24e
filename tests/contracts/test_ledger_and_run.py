"""Claims about ledgers and run folders: torn lines vanish, counts must add up, changed settings are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import IncompleteError, UserError
from contracts.ledger import Ledger, LedgerWriter, check_counts, read_entries
from contracts.run import Run, read_run


def open_run(folder: Path, **changes: object) -> Run:
    settings = {"temperature": 0.0, **changes}
    return Run.open(folder, "synth generate", settings=settings, inputs={"prompts": "abc"}, recipe_yaml="a: 1\n")


def append(path: Path, *entries: dict[str, object]) -> LedgerWriter:
    writer = LedgerWriter(path)
    assert list(writer.read()) == list(read_entries(path))
    writer.append(entries)
    writer.close()
    return writer


def test_a_torn_last_line_is_left_out_by_readers_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, {"id": "a", "status": "done", "tokens": 3}, {"id": "b", "status": "done", "tokens": 4})
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    assert Ledger(path).ids("done") == ["a"]
    assert path.read_bytes() == torn
    append(path, {"id": "b", "status": "done", "tokens": 4})
    assert Ledger(path).ids("done") == ["a", "b"]
    assert path.read_text().count("\n") == 2


def test_a_broken_line_in_the_middle_is_an_error_not_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"id": "a", "status": "done"}\nnot json\n{"id": "b", "status": "done"}\n')
    with pytest.raises(UserError, match=r"ledger\.jsonl:2"):
        Ledger(path)


def test_reading_a_ledger_that_is_not_there_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Ledger(tmp_path / "ledger.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_last_line_of_an_id_wins(tmp_path: Path) -> None:
    append(tmp_path / "ledger.jsonl", {"id": "a", "status": "failed"}, {"id": "a", "status": "done"})
    assert Ledger(tmp_path / "ledger.jsonl").counts() == {"done": 1, "truncated": 0, "filtered": 0, "failed": 0}


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="status"):
        append(tmp_path / "ledger.jsonl", {"id": "a", "status": "finished"})


def test_counts_that_do_not_add_up_are_an_error(tmp_path: Path) -> None:
    check_counts(tmp_path, {"done": 2, "failed": 1}, 3)
    with pytest.raises(IncompleteError, match=r"found 3 rows.*expected 4"):
        check_counts(tmp_path, {"done": 2, "failed": 1}, 4)


def test_a_folder_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run._lock.close()
    with pytest.raises(UserError, match=r"settings\.temperature.*found 1\.0, expected 0\.0"):
        open_run(tmp_path, temperature=1.0)


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UserError, match="another process"):
        open_run(tmp_path)
    run._lock.close()
    open_run(tmp_path)


def test_a_run_keeps_recipe_command_and_time(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UserError, match="unfinished"):
        read_run(tmp_path, "synth generate")
    run.finish({"done": 3})
    run._lock.close()
    assert (tmp_path / "resolved.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "command.txt").read_text()
    assert read_run(tmp_path, "synth generate")["summary"] == {"done": 3}
    with pytest.raises(UserError, match="found the output of `synth generate`, expected that of `dump run`"):
        read_run(tmp_path, "dump run")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"a file system that refuses file locks \(.*Lustre: -o flock"):
        open_run(tmp_path)

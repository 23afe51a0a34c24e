"""Claims about ledgers and run folders: torn lines vanish, counts must add up, changed settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from contracts.errors import IncompleteError, UserError
from contracts.ledger import Ledger, check_counts
from contracts.run import Run, read_run


def open_run(folder: Path, **changes: object) -> Run:
    settings = {"temperature": 0.0, **changes}
    return Run.open(folder, "synth generate", settings=settings, inputs={"prompts": "abc"}, recipe_yaml="a: 1\n")


def test_a_torn_last_line_is_cut_off_and_its_row_is_open_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append("a", "done", tokens=3)
    ledger.append("b", "done", tokens=4)
    ledger.close()
    path.write_bytes(path.read_bytes()[:-5])
    ledger = Ledger(path)
    assert "a" in ledger
    assert "b" not in ledger
    ledger.append("b", "done", tokens=4)
    assert ledger.total("tokens") == 7
    assert path.read_text().count("\n") == 2


def test_a_broken_line_in_the_middle_is_an_error_not_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"id": "a", "status": "done"}\nnot json\n{"id": "b", "status": "done"}\n')
    with pytest.raises(UserError, match=r"ledger\.jsonl:2"):
        Ledger(path)


def test_the_last_line_of_an_id_wins(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("a", "failed", "timeout")
    ledger.append("a", "done")
    assert ledger.counts() == {"done": 1, "truncated": 0, "filtered": 0, "failed": 0}


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="status"):
        Ledger(tmp_path / "ledger.jsonl").append("a", "finished")


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

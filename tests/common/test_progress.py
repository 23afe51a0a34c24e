"""Claims about progress: plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, run_here
from written import write_conversations

import common.progress
from common.progress import Progress, track, wait_for


def test_without_a_terminal_each_interval_is_a_plain_line_with_counts_rate_and_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(4, "dump", "sample", initial=1, line_interval_s=0.0) as progress:
        progress.set_note("12 tok/s")
        progress.update()
        progress.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("dump: 2/4 [")
    assert lines[1].startswith("dump: 4/4 [")
    assert all("sample" in line and line.endswith("12 tok/s]") and "\r" not in line for line in lines)


def test_a_short_loop_without_a_terminal_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "eval", "sample")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_the_last_line_has_the_final_count_and_an_unknown_total_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(iter(range(3)), "eval", "sample", line_interval_s=0.0))
    assert capsys.readouterr().err.splitlines()[-1].startswith("eval: 3/?")
    list(track(range(3), "eval", "sample", line_interval_s=0.0))
    assert capsys.readouterr().err.splitlines()[-1].startswith("eval: 3/3")


def test_on_a_terminal_there_is_a_bar_and_no_line() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    code = "from common.progress import track; list(track(range(3), 'eval', 'sample', line_interval_s=0.0))"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, cwd=ROOT, check=True)
    os.close(theirs)
    printed = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "100%|" in printed
    assert "eval: 3/3 [" not in printed


def test_a_process_without_progress_of_its_own_is_waited_for_with_a_line_an_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.progress, "LINE_INTERVAL_S", 0.05)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit(3)"])
    assert wait_for(process, "bench: 1k1k") == 3
    assert capsys.readouterr().err.startswith("bench: 1k1k: 0 s so far\n")


def test_a_dump_and_a_training_print_lines_where_there_is_no_terminal(
    recipe_path: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.progress, "LINE_INTERVAL_S", 0.0)
    rows, store = write_conversations(target_folder, tmp_path / "rows", 9), tmp_path / "store"
    more = ("--recipe", recipe_path, "--set", "dump.backend=hf", "--set", "train.num_steps=2")
    told = run_here("dump", "run", *more, "--conversations", rows, "--output", store).stderr
    assert "dump: 9/9 [" in told
    assert "tok/s, " in told
    told = run_here("train", "offline", *more, "--store", store, "--output", tmp_path / "draft").stderr
    assert "train: 2/2 [" in told

"""Claims about the processes that store samples: how they end with a run."""

from __future__ import annotations

import os
import signal
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from dump.writer import open_writers


def stall(path: Path) -> None:
    """Say that it runs, and never end."""
    path.touch()
    signal.pause()


def store(path: Path) -> int:
    path.touch()
    return os.getpid()


def test_what_was_begun_is_stored_and_what_waits_is_dropped_when_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dump.writer.STOP_TIMEOUT_S", 300.0)  # on a busy machine a writer takes long to start
    with open_writers(1) as writers:
        jobs = [writers.submit(store, tmp_path / str(number)) for number in range(200)]
    done = [job for job in jobs if not job.cancelled()]
    assert 0 < len(done) < len(jobs)
    assert {path.name for path in tmp_path.iterdir()} == {str(jobs.index(job)) for job in done}
    with pytest.raises(ProcessLookupError):
        os.kill(done[0].result(), 0)


def test_a_writer_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dump.writer.STOP_TIMEOUT_S", 0.2)
    with open_writers(1) as writers:
        number = writers.submit(os.getpid).result()
        stalled = writers.submit(stall, tmp_path / "runs")
        while not (tmp_path / "runs").exists():
            wait([stalled], timeout=0.05)
    assert isinstance(stalled.exception(), BrokenProcessPool)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)

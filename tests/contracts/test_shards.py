"""Claims about generations of shards: the one worked on last is known by content, whatever copying does to times."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from contracts.run import Run
from contracts.shards import folders_by_count, is_at_work, shard_folder


def work_on(folder: Path, number: int, count: int) -> None:
    path = shard_folder(folder, number, count)
    run = Run.open(path, "dump run", settings={}, inputs={}, recipe_yaml="")
    run.tick(0.0)
    run._lock.close()


def test_the_latest_generation_is_the_one_worked_on_last_also_after_a_return_to_an_earlier_one(tmp_path: Path) -> None:
    for number in range(2):
        work_on(tmp_path, number, 2)
    assert list(folders_by_count(tmp_path)) == [2]
    work_on(tmp_path, 2, 3)
    work_on(tmp_path, 0, 3)
    assert list(folders_by_count(tmp_path)) == [2, 3]
    work_on(tmp_path, 0, 2)
    assert list(folders_by_count(tmp_path)) == [3, 2]
    work_on(tmp_path, 1, 2)
    assert list(folders_by_count(tmp_path)) == [3, 2]


def test_a_copy_with_fresh_times_has_the_same_latest_generation(tmp_path: Path) -> None:
    work_on(tmp_path / "run", 0, 4)
    work_on(tmp_path / "run", 0, 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copy)
    for age, count in ((0, 2), (1000, 4)):  # as if the folders had been copied in the other order
        os.utime(shard_folder(tmp_path / "copy", 0, count) / "run.json", (1e9 + age, 1e9 + age))
    assert list(folders_by_count(tmp_path / "copy")) == list(folders_by_count(tmp_path / "run")) == [4, 2]


def test_a_run_that_is_no_shard_has_no_generation(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "00000-of-00002", "dump run", settings={}, inputs={}, recipe_yaml="")
    assert "generation" not in run.state


def test_a_process_at_work_is_seen(tmp_path: Path) -> None:
    run = Run.open(tmp_path, "dump run", settings={}, inputs={}, recipe_yaml="")
    assert is_at_work(tmp_path)
    run._lock.close()
    assert not is_at_work(tmp_path)


def test_where_a_file_system_has_no_locks_no_shard_counts_as_being_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.lock").touch()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not is_at_work(tmp_path)

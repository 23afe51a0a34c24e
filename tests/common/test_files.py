"""Claims about outputs that cannot be written: one line that names the path, no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, command, run_here
from written import write_store

from common.errors import UserError
from common.files import write_atomic
from contracts.run import Run
from target.target import Target

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a folder read-only")


def open_run(folder: Path) -> Run:
    return Run.open(folder, "synth generate", settings={}, inputs={}, recipe_yaml="")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("in the way")
    return path


@pytest.mark.parametrize("below", ["", "run", "a/b/run"])
def test_a_file_in_the_way_of_a_runs_folder_is_a_user_error(file: Path, below: str) -> None:
    with pytest.raises(UserError, match=r"file.*cannot be written \((file exists|not a directory).*another --output"):
        open_run(file / below)


def test_a_file_in_the_way_of_a_single_output_is_a_user_error(file: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written"):
        write_atomic(file / "report.json", "{}")


def test_a_folder_in_the_place_of_a_single_output_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(is a directory"):
        write_atomic(tmp_path, "{}")


def test_a_file_system_that_makes_no_files_is_a_user_error() -> None:
    for path in (Path("/proc/draftline"), Path("/sys/draftline")):
        with pytest.raises(UserError, match="cannot be written"):
            open_run(path)
        with pytest.raises(UserError, match="cannot be written"):
            write_atomic(path, "{}")


def test_a_full_disk_is_not_taken_for_a_wrong_path(tmp_path: Path) -> None:
    (tmp_path / ".full.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        write_atomic(tmp_path / "full", "content")
    assert raised.value.errno == errno.ENOSPC


@needs_mounts
def test_a_stage_says_in_one_line_that_its_output_is_read_only(
    recipe_path: Path, prompts_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    words = command("synth", "generate", "--recipe", recipe_path, "--prompts", prompts_path, "--output",
                    tmp_path / "run", "--endpoint", scripted_server)  # fmt: skip
    mounts = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounts, tmp_path, *words],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip(f"no mounts here: {result.stderr}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path}/run: found a path that cannot be written (read-o"
    )
    assert "Traceback" not in result.stderr


def test_every_kind_of_output_is_told_in_one_line(
    recipe_path: Path, target_folder: Path, file: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    recipe, draft = ("--recipe", recipe_path), tmp_path / "draft"
    run_here("train", "offline", *recipe, "--store", store, "--output", draft)
    for words in (
        ("train", "eval", *recipe, "--run", draft, "--store", store, "--output", file / "eval.json"),
        ("train", "export", *recipe, "--run", draft, "--output", file / "export"),
        ("dump", "convert", store, "--to", "modelopt", "--output", file / "store"),
        ("train", "offline", *recipe, "--store", store, "--output", file / "draft"),
        ("distributed", "submit", "train", *recipe, "--input", store, "--output", file, "--cluster", "debug"),
    ):
        result = run_here(*words, check=False)
        assert (result.returncode, "Traceback" in result.stderr) == (2, False), (words, result.stderr)
        assert "cannot be written" in result.stderr
    for words, told in (
        (("train", "eval", *recipe, "--run", draft, "--store", store, "--output", tmp_path), "is a directory"),
        (("train", "export", *recipe, "--run", draft, "--output", file), "not a directory"),
        (("train", "export", *recipe, "--run", draft, "--output", tmp_path / "export", "--eval", tmp_path / "none"),
         "found no such file, expected a report of `train eval`"),
        (("dump", "convert", store, "--to", "speculators", "--output", "/proc/self"), "cannot be written"),
    ):  # fmt: skip
        result = run_here(*words, check=False)
        assert (result.returncode, "Traceback" in result.stderr) == (2, False), (words, result.stderr)
        assert told in result.stderr

"""Claims about the staging folder: a live run keeps its own, a killed run's is deleted, in whichever container."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import dump.staging
from dump.staging import LOCK_FILE, open_staging
from recipe.dump import DumpSection

NOBODY = 65534

CODE = """
import sys
from pathlib import Path
from dump.staging import open_staging
from recipe.dump import DumpSection

with open_staging(DumpSection(staging_dir=Path(sys.argv[1])), Path("unused")) as staging:
    print(staging.folder, flush=True)
    sys.stdin.read()
"""


class Stager:
    """A process that holds a staging folder until it is told to end."""

    def __init__(self, parent: Path, *prefix: str) -> None:
        command = [*prefix, sys.executable, "-c", CODE, str(parent)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())
        assert self.folder.parent == parent

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[Stager]:
    stager = Stager(tmp_path)
    (stager.folder / "sample.safetensors").write_bytes(b"states")
    try:
        yield stager
    finally:
        stager.process.kill()
        stager.process.wait()


def test_a_run_in_another_pid_namespace_leaves_a_live_runs_staging_alone(alive: Stager, tmp_path: Path) -> None:
    own_namespace = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*own_namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to make a PID namespace")
    other = Stager(tmp_path, *own_namespace)
    assert (alive.folder / "sample.safetensors").exists()
    assert other.folder.exists()
    other.end()
    alive.end()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_run_is_deleted_by_the_next_one_and_no_other_folder(
    alive: Stager, tmp_path: Path
) -> None:
    os.kill(alive.process.pid, signal.SIGKILL)
    alive.process.wait()
    (tmp_path / "draftline-dump-elsewhere-abc_1-17").mkdir()
    assert alive.folder.exists()
    Stager(tmp_path).end()
    assert [path.name for path in tmp_path.iterdir()] == ["draftline-dump-elsewhere-abc_1-17"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_folder_of_another_user_is_left_alone() -> None:
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder)
        parent.chmod(0o777)
        foreign = parent / f"draftline-dump-{socket.gethostname()}-abc_1-17"
        foreign.mkdir(mode=0o700)
        (foreign / LOCK_FILE).touch()
        code = f"import dump.staging, os\nos.seteuid({NOBODY})\n{CODE}"
        subprocess.run([sys.executable, "-c", code, folder], stdin=subprocess.DEVNULL, cwd=ROOT, check=True)
        assert [path.name for path in parent.iterdir()] == [foreign.name]


def test_local_memory_without_enough_free_bytes_is_left_alone_though_it_may_be_written(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump.staging, "LOCAL_MEMORY", small_disk)

    def choose_parent(mib: int) -> Path:
        with open_staging(DumpSection(staging_gib=mib / 1024), tmp_path / "store") as staging:
            return staging.folder.parent

    assert choose_parent(mib=5) == small_disk
    assert choose_parent(mib=9) == tmp_path / "store/staging"
    (small_disk / "of-another-process").write_bytes(bytes(4 * 2**20))
    assert choose_parent(mib=5) == tmp_path / "store/staging"
    assert choose_parent(mib=3) == small_disk

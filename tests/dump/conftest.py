"""Conversations to dump, and a small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from written import write_conversations


@pytest.fixture(scope="session")
def conversations(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(target_folder, tmp_path_factory.mktemp("conversations"), 60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB in memory, where we may mount one; tests change its size with `mount -o remount`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)

"""Claims about the memory that counts as free."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import memory
from common.memory import free_memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 KiB available, in a control group without a limit."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:  4000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\nHugePages_Total:  0\n"
    )
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    return tmp_path


def test_free_memory_is_what_the_system_has_available(machine: Path) -> None:
    assert free_memory() == 1000 * 1024


def test_a_limit_of_the_control_group_counts_but_cached_files_do_not(machine: Path) -> None:
    (machine / "memory.max").write_text("500000\n")
    (machine / "memory.current").write_text("490000\n")
    (machine / "memory.stat").write_text("anon 90000\nfile 400000\ninactive_file 300000\nactive_file 100000\n")
    assert free_memory() == 410_000


def test_without_proc_all_memory_counts_as_free(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert free_memory() > 1 << 30

"""The memory that this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the free bytes: of the system, or what the control group (a container's, a job's) leaves, if less.

    Cached files do not count as taken: the kernel drops them. Without /proc, all memory counts as free.
    """
    if not MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _read_table(MEMINFO)["MemAvailable:"] * 1024
    limit = CONTROL_GROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        files = _read_table(CONTROL_GROUP / "memory.stat")
        taken = int((CONTROL_GROUP / "memory.current").read_text())
        free = min(free, int(most) - taken + files["inactive_file"] + files["active_file"])
    return free


def _read_table(path: Path) -> dict[str, int]:
    """Return the first number of each line by the line's first word."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}

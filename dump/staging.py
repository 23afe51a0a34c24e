"""The folder in which captured states wait to be stored.

Several runs may share the parent folder, also from different containers: /dev/shm can be one file system with several
PID namespaces. So each run holds a lock in its folder, and deletes another folder of its host only if it can take that
folder's lock, which the kernel releases when a process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.files import make_folder
from dump.capture import Staging
from recipe.dump import DumpSection

LOCAL_MEMORY = Path("/dev/shm")  # noqa: S108 (a folder of our own is made in it)
LOCK_FILE = "run.lock"


@contextlib.contextmanager
def open_staging(section: DumpSection, store_folder: Path) -> Iterator[Staging]:
    """Make an empty staging folder and delete it at the end; delete the staging folders of killed runs.

    Its parent is the recipe's `dump.staging_dir`, else /dev/shm, else a folder in the store.
    """
    limit_bytes = int(section.staging_gib * 2**30)
    in_memory = os.access(LOCAL_MEMORY, os.W_OK) and shutil.disk_usage(LOCAL_MEMORY).free >= limit_bytes
    parent = section.staging_dir or (LOCAL_MEMORY if in_memory else store_folder / "staging")
    make_folder(parent)
    prefix = f"draftline-dump-{socket.gethostname()}-"
    _delete_abandoned(parent, prefix)
    folder, lock = _make_locked_folder(parent, prefix)
    try:
        yield Staging(folder, limit_bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=f"-{os.getpid()}", dir=parent))
        lock = os.open(folder / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: other runs cannot take it either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK_FILE).exists():
            return folder, lock
        os.close(lock)  # another run took the lock first, and deleted the folder


def _delete_abandoned(parent: Path, prefix: str) -> None:
    """Delete the staging folders of this host whose lock no process holds."""
    name = re.compile(re.escape(prefix) + r"\w+-\d+")
    for folder in parent.iterdir():
        if name.fullmatch(folder.name):
            # Errors: another user's folder, a folder without a lock file, a lock that is held.
            with contextlib.suppress(OSError), (folder / LOCK_FILE).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

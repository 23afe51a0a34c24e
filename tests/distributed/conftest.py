"""The folder of a run that the tests of its status fill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    found = RunFolder(tmp_path / "run")
    found.path.mkdir()
    yield found
    for run in found.runs.values():
        run._lock.close()

"""Claims about cores: a process counts those that it may use, not those of the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common.cores import count_cores

CODE = """
import os
from common.cores import count_cores
usable = sorted(os.sched_getaffinity(0))
counts = [count_cores()]
os.sched_setaffinity(0, usable[:1])
print(*counts, count_cores())
"""


def test_cores_that_a_scheduler_withholds_are_not_counted() -> None:
    usable = len(os.sched_getaffinity(0))
    if usable < 2:
        pytest.skip("needs two cores, to withhold one")
    result = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == [str(usable), "1"]


def test_where_a_system_tells_no_affinity_all_cores_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert count_cores() == 12

"""Claims about MKL's vector functions: one thread makes their first calls, wherever we compute on a CPU."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_target
import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from common.vml import FUNCTIONS, settle_vector_functions
from target.head import read_head
from target.target import Target

SHARED_OUT = 2048  # elements from which on torch gives an operation to several threads
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")


class FirstCalls(TorchDispatchMode):
    """The number of elements that each function was first called with, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in FUNCTIONS:
            self.elements.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls() -> Iterator[FirstCalls]:
    """As in a new process."""
    settle_vector_functions.cache_clear()
    with FirstCalls() as calls:
        yield calls
    settle_vector_functions()


def first_calls_are_small(calls: FirstCalls) -> None:
    assert set(calls.elements) == {(name, dtype) for name in FUNCTIONS for dtype in (torch.float32, torch.float64)}
    assert max(calls.elements.values()) < SHARED_OUT, calls.elements


def test_transformers_computes_after_the_first_calls(calls: FirstCalls, target_folder: Path) -> None:
    from dump.hf import load_model

    model = load_model(Target.read(target_folder), torch.float32)
    model(torch.arange(200)[None])  # its rotary table has 200 x 32 elements
    first_calls_are_small(calls)


def test_whatever_reads_the_targets_head_computes_after_the_first_calls(calls: FirstCalls, target_folder: Path) -> None:
    head = read_head(Target.read(target_folder))
    head.lm_head.cos()  # its 1024 x 64 elements are shared out
    first_calls_are_small(calls)


def test_the_tiny_target_is_trained_after_the_first_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    monkeypatch.setattr(make_target, "settle_vector_functions", lambda: done.append("settled"))
    monkeypatch.setattr(make_target, "read_subjects", lambda: sys.exit(3))  # what main begins with
    monkeypatch.setattr(sys, "argv", ["make_target.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="3"):
        make_target.main()
    assert done == ["settled"]


@needs_mkl
def test_the_functions_are_all_that_torch_takes_from_mkl() -> None:
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = {name.decode().lower() for name in re.findall(rb"\0vms([A-Z][A-Za-z0-9]+)\0", data)}
    assert {{"ln": "log"}.get(name, name) for name in names} == set(FUNCTIONS)


@needs_mkl
@pytest.mark.long
@pytest.mark.rare  # the tests above fail if it is left out somewhere
@pytest.mark.timeout(1200)
def test_no_process_of_thousands_computes_wrong_cosines() -> None:
    words = [sys.executable, "benchmarks/first_calls.py", "--waves", "100"]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "with settled functions: 0 of 2400 processes" in printed

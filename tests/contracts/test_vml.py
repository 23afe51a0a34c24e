"""Claims about MKL's vector functions: one thread makes their first calls, wherever we compute on a CPU."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contracts.target import Target
from contracts.target_weights import read_head
from contracts.vml import FUNCTIONS, settle_vector_functions

SHARED_OUT = 2048  # elements from which on torch gives an operation to several threads


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


@pytest.mark.skipif(not hasattr(os, "fork") or not torch.backends.mkl.is_available(), reason="needs fork and MKL")
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_no_process_of_thousands_gets_another_cosine() -> None:
    """Without the first calls 3 of 3600 did."""
    assert sum(_cosines_of_a_wave(24) for _ in range(150)) == 0


def _cosines_of_a_wave(processes: int) -> int:
    """How many of so many processes, started at once, compute a cosine that is more than 1e-5 off."""
    start, go = os.pipe()
    children = []
    for _ in range(processes):
        answer, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go)
            torch.set_num_threads(3)
            settle_vector_functions()
            values = torch.arange(1, 200_001) * 1e-3
            os.read(start, 1)
            cosines = values.cos()
            os.write(tell, struct.pack("d", (cosines.double() - values.double().cos()).abs().max()))
            os._exit(0)
        os.close(tell)
        children.append((pid, answer))
    os.close(start)
    os.close(go)
    wrong = 0
    for pid, answer in children:
        wrong += struct.unpack("d", os.read(answer, 8))[0] > 1e-5
        os.close(answer)
        os.waitpid(pid, 0)
    return wrong

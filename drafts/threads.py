"""Run chains of small operations on several threads, one core each, or on one core alone.

Torch splits every operation over all cores and synchronizes after it; operations under a millisecond then wait as long
as they compute. Threads that each run a whole chain synchronize once and keep their data in one core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
SMALL = 1 << 18
"""Elements of a tensor that one core reads and writes as fast as others are woken up (about 50 microseconds)."""


@contextmanager
def on_one_core(x: torch.Tensor) -> Iterator[None]:
    """Run operations on tensors of the size of `x` on the calling thread's core, if they are small."""
    count = torch.get_num_threads()
    if count == 1 or x.numel() > SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def share_out(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
    """Run `work` on every nth item in each of n threads, without gradients; return results in order.

    n is torch's number of threads, or the number of items if that is less.
    """
    count = min(torch.get_num_threads(), len(items))
    inference = torch.is_inference_mode_enabled()

    def work_without_gradients(part: Sequence[Item]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # these modes are per thread
            return work(part)

    if count <= 1:
        return [work_without_gradients(items)]
    return list(_pool(count).map(work_without_gradients, [items[start::count] for start in range(count)]))


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    # torch's number of threads is a setting per thread.
    return ThreadPoolExecutor(count, "share", initializer=_use_one_core)


def _use_one_core() -> None:
    torch.get_num_threads()  # the first call copies another thread's setting; later ones keep this thread's own
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

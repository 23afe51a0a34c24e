"""Run chains of small operations on several threads, one core each.

Torch splits every operation over all cores and synchronizes after it; operations under a millisecond then wait as long
as they compute. Threads that each run a whole chain synchronize once and keep their data in one core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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

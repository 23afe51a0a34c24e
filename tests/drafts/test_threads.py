"""Claims about work shared out over threads."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread

import torch

from drafts.threads import _pool, share_out


def test_a_worker_keeps_its_one_core_whatever_another_thread_sets_before_its_first_operation() -> None:
    before = torch.get_num_threads()

    def work(_: Sequence[int]) -> int:
        other = Thread(target=torch.set_num_threads, args=(2,))
        other.start()
        other.join()
        return torch.get_num_threads()

    _pool.cache_clear()
    try:
        torch.set_num_threads(2)
        assert share_out(work, [0, 1]) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        _pool.cache_clear()

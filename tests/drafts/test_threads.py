"""Claims about work shared out over threads."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread

import pytest
import torch

from drafts.threads import SMALL, _pool, on_one_core, share_out


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


def test_small_tensors_are_computed_on_one_core_and_the_others_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with on_one_core(torch.empty(SMALL, device="meta")):
            assert torch.get_num_threads() == 1
        with on_one_core(torch.empty(SMALL + 1, device="meta")):
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), on_one_core(torch.empty(1)):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

"""The order in which a training reads, and how far a window of bytes reaches in it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from drafts.order import Order, Schedule


@pytest.mark.parametrize("seed", range(4))
def test_a_window_reaches_as_far_as_its_bytes_do(seed: int) -> None:
    rng = random.Random(seed)
    sizes = np.array([rng.randint(1, 50) for _ in range(rng.randint(3, 30))])
    order = Order(len(sizes), seed)
    schedule = Schedule(order, sizes, num_places=120, per_step=4)
    in_order = [int(sizes[order.pick(place)]) for place in range(200)]
    for first in range(120):
        assert schedule.bytes_between(first, 120) == sum(in_order[first:120])
        window = rng.randint(0, 400)
        end = first
        while end < 120 and sum(in_order[first : end + 1]) <= window:
            end += 1
        assert schedule.reach(first, window) == end
    assert schedule.largest_step() == max(sum(in_order[start : start + 4]) for start in range(0, 120, 4))


def test_an_epoch_has_every_sample_once_in_an_order_that_depends_on_seed_and_epoch() -> None:
    order = Order(50, seed=3)
    epochs = [[order.pick(place) for place in range(start, start + 50)] for start in (0, 50, 200, 0)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] == epochs[3]
    assert epochs[0] != epochs[1]
    generator = torch.Generator().manual_seed(3 * 7_919 + 4)
    assert epochs[2] == torch.randperm(50, generator=generator).tolist()

"""Run `train offline` under torchrun with ranks whose held-out lengths differ, as rounding can make them."""

from __future__ import annotations

import os
import sys

import train.offline
from train.cli import app

RANK = int(os.environ["RANK"])

if __name__ == "__main__":
    # Rank 0 improves at every look, rank 1 never.
    lengths = iter(range(2, 100))
    train.offline.held_out_length = lambda _: float(next(lengths)) if RANK == 0 else 0.5
    app(sys.argv[1:])

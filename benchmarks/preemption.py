"""Simulate preemption and slow nodes in a synthesis of 64 array tasks: lost work as a share of all work.

    python benchmarks/preemption.py [--tasks 64] [--rows 500000] [--in-flight 256]

Each task starts a server, then works on its part of the rows, `--in-flight` at a time. A preempted task is queued
again, waits, and starts its server again. Finished rows are kept, because each has its ledger line; rows in flight are
repeated. After a warning (SLURM's signal) a task takes no more rows and finishes those it can before the end. Slow
nodes take twice as long. Also printed: the time until the last task ends, relative to the same tasks without preemption
and slow nodes; and the same time with four times as many tasks, which balances slow nodes. Exits with an error if a
simulation does not finish every row exactly once.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from dataclasses import dataclass


@dataclass
class Result:
    """Finished rows; row-hours of kept work, of lost work and of server starts; hours until the last task ends."""

    rows: float = 0.0
    work: float = 0.0
    lost: float = 0.0
    starts: float = 0.0
    end: float = 0.0


def simulate(
    args: argparse.Namespace, *, tasks: int, every_h: float | None, warning_h: float, slow: float, seed: int = 0
) -> Result:
    """Simulate one run, in hours. `every_h`: mean time between preemptions of a node; None: never.

    Exits unless every row is finished once.
    """
    rng = random.Random(seed)
    result, free = Result(), [0.0] * args.nodes
    is_slow = [rng.random() < slow for _ in range(args.nodes)]
    row_h = args.row_s / 3600
    queue = [(0.0, args.rows / tasks) for _ in range(tasks)]  # earliest start, rows left
    heapq.heapify(queue)
    nodes = [(time, node) for node, time in enumerate(free)]
    heapq.heapify(nodes)
    while queue:
        ready, rows = heapq.heappop(queue)
        when, node = heapq.heappop(nodes)
        start = max(ready, when)
        pace = row_h * (2.0 if is_slow[node] else 1.0)
        rate = args.in_flight / pace  # rows per hour
        life = rng.expovariate(1 / every_h) if every_h else float("inf")
        needed = args.start_h + rows / rate
        result.starts += min(life, args.start_h) * args.in_flight
        if life >= needed:
            result.rows += rows
            result.work += rows * pace
            heapq.heappush(nodes, (start + needed, node))
            result.end = max(result.end, start + needed)
            continue
        working = max(0.0, life - args.start_h)
        finished = min(rows, working * rate)
        flight = min(args.in_flight, rows - finished)
        # A row in flight is half done on average. Those that end within the warning are kept.
        kept = flight * min(1.0, warning_h / pace)
        result.rows += finished
        result.work += finished * pace
        result.lost += (flight - kept) * pace / 2 if working else 0.0
        heapq.heappush(queue, (start + life + args.queue_h, rows - finished))
        heapq.heappush(nodes, (start + life, node))
    if not math.isclose(result.rows, args.rows, rel_tol=1e-6):
        raise SystemExit(f"{tasks} tasks finished {result.rows:.0f} rows, expected each of the {args.rows:.0f} once")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--rows", type=float, default=500_000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--row-s", type=float, default=55.0, help="seconds of a row: 1,700 tokens at 31 tokens/s each")
    parser.add_argument("--start-h", type=float, default=0.25, help="hours of a server's start")
    parser.add_argument("--queue-h", type=float, default=0.1, help="hours in the queue after a preemption")
    args = parser.parse_args()
    ideal = simulate(args, tasks=args.tasks, every_h=None, warning_h=0.0, slow=0.0).end
    titles = ("preempted every", "warning", "slow nodes", "lost rows", "starts", "time", "4x tasks")
    print("".join(f"{title:>16}" for title in titles))
    for every_h in (None, 12.0, 4.0, 1.0):
        for warning_s, slow in ((0.0, 0.0), (180.0, 0.0), (180.0, 0.1)):
            if every_h is None and warning_s and not slow:
                continue
            settings = {"every_h": every_h, "warning_h": warning_s / 3600, "slow": slow}
            found = simulate(args, tasks=args.tasks, **settings)
            many = simulate(args, tasks=4 * args.tasks, **settings)
            whole = found.work + found.lost + found.starts
            cells = [
                "never" if every_h is None else f"{every_h:g} h", f"{warning_s:.0f} s", f"{slow:.0%}",
                f"{found.lost / whole:.2%}", f"{found.starts / whole:.1%}", f"{found.end / ideal:.2f}",
                f"{many.end / ideal:.2f}",
            ]  # fmt: skip
            print("".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()

"""Count new processes that compute wrong cosines, with and without `settle_vector_functions` (common/vml.py).

    python benchmarks/first_calls.py [--waves 150] [--busy 3]

Waves of 24 processes with three threads each start at once and compute 200,000 cosines as their first operation, while
other processes keep the cores busy. Prints how many processes had an error above 1e-5. Exits with an error if a
process gives no answer, or if torch has no MKL, whose functions these are.
"""

from __future__ import annotations

import argparse
import math
import os
import struct
import subprocess
import sys

import torch

from common.vml import settle_vector_functions

PROCESSES, THREADS = 24, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waves", type=int, default=150, help="waves of each kind (default: %(default)s)")
    parser.add_argument(
        "--busy", type=int, default=3, help="processes that only keep cores busy (default: %(default)s)"
    )
    args = parser.parse_args()
    if not torch.backends.mkl.is_available():
        raise SystemExit("this torch computes cosines without MKL: found nothing to settle, expected a build with MKL")
    wrong = {"without": 0, "with": 0}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        for _ in range(args.waves):
            for kind in wrong:
                wrong[kind] += count_wrong(settle=kind == "with")
    finally:
        for process in busy:
            process.kill()
    for kind, count in wrong.items():
        print(f"{kind} settled functions: {count} of {args.waves * PROCESSES} processes computed wrong cosines")


def count_wrong(*, settle: bool) -> int:
    """Run one wave; return the number of wrong processes.

    The parent computes nothing, because its children would inherit settled functions.
    """
    start, go = os.pipe()
    children = []
    for _ in range(PROCESSES):
        answer, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(go)
                compute(start, tell, settle=settle)
            finally:
                os._exit(0)  # also after an error: the parent then reads no answer
        os.close(tell)
        children.append((pid, answer))
    os.close(start)
    os.close(go)  # starts all children: their reads of the pipe return
    answers = []
    for pid, answer in children:
        answers.append(os.read(answer, 8))
        os.close(answer)
        os.waitpid(pid, 0)
    return sum(error > 1e-5 for error in read_errors(answers))


def read_errors(answers: list[bytes]) -> list[float]:
    """Return the largest error of each process's cosines. Exits unless all processes computed some."""
    errors = [struct.unpack("d", answer)[0] for answer in answers if len(answer) == 8]
    computed = sum(map(math.isfinite, errors))
    if computed < PROCESSES:
        raise SystemExit(f"found cosines of {computed} processes in a wave, expected {PROCESSES}")
    return errors


def compute(start: int, tell: int, *, settle: bool) -> None:
    torch.set_num_threads(THREADS)
    if settle:
        settle_vector_functions()
    values = torch.arange(1, 200_001) * 1e-3
    os.read(start, 1)
    cosines = values.cos()
    os.write(tell, struct.pack("d", (cosines.double() - values.double().cos()).abs().max()))


if __name__ == "__main__":
    main()

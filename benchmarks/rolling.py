"""Train from a rolling store while it is captured, against the same training on the whole store.

    python benchmarks/rolling.py --recipe recipes/Tiny-DFlash/recipe.yaml --conversations RUN/synth/train \
        --set target.path=RUN/target --work FOLDER [--share 0.05] [--pace 1.0]

Captures with transformers in fp32 on the first core and trains on the second one. The capture is slowed down to
`--pace` times the tokens/s of the training on the whole store. The training begins once the window is full.
Prints the training's seconds per step relative to the whole store, the share of them that it waits for samples, and the
largest size of the store's folder relative to the window. Exits with an error if the weights differ in any bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("dump.backend=hf", "dump.dtype=float32", "dump.args.dtype=float32", "dump.writers=1", "train.num_threads=1")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--share", type=float, default=0.05, help="the window, as a share of the whole store")
    parser.add_argument("--pace", type=float, default=1.0, help="the capture's speed relative to the training's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--capture-at", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--window", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    """Run both trainings and print their figures."""
    whole, rolling = args.work / "whole", args.work / "rolling"
    recipe = ["--recipe", args.recipe, *(word for value in (*SETTINGS, *args.set) for word in ("--set", value))]
    call(0, "dump", "run", *recipe, "--conversations", args.conversations, "--output", whole / "store")
    call(1, "train", "offline", *recipe, "--store", whole / "store", "--output", whole / "draft")
    size = folder_bytes(whole / "store")
    window = args.share * size
    tokens_per_s = trained_tokens_per_s(whole / "draft")
    capture = start(
        0, sys.executable, __file__, *recipe, "--conversations", args.conversations, "--work", rolling,
        "--window", window / 2**30, "--capture-at", args.pace * tokens_per_s,
    )  # fmt: skip
    peak = Peak(rolling / "store")
    wait_until_full(rolling / "store", capture)
    call(1, "train", "offline", *recipe, "--store", rolling / "store", "--output", rolling / "draft", "--follow")
    if capture.wait():
        raise SystemExit("the capture failed")
    seconds = [step_seconds(folder / "draft") for folder in (whole, rolling)]
    position = json.loads((rolling / "store/trainer.json").read_text())
    print(f"whole store              {size / 2**20:.1f} MiB; window {window / 2**20:.1f} MiB ({args.share:.0%})")
    print(f"training                 {tokens_per_s:.0f} tokens/s; capture paced at {args.pace:g} of it")
    print(f"seconds a step           {seconds[1]:.4f} / {seconds[0]:.4f} = {seconds[1] / seconds[0]:.3f}")
    print(f"waiting for samples      {position['waited_s'] / position['seconds']:.1%} of the training's time")
    print(f"largest size of folder   {peak.stop() / window:.3f} of the window")
    ours, theirs = last_weights(rolling / "draft"), last_weights(whole / "draft")
    if not all(torch.equal(ours[name], theirs[name]) for name in theirs):
        raise SystemExit("the weights differ")
    print(f"weights                  all {len(theirs)} tensors equal to the bit")


def start(core: int, *words: object) -> subprocess.Popen[bytes]:
    """Start a command on one core."""
    first, *rest = map(str, words)
    program = first if "/" in first else str(Path(sys.executable).with_name(first))
    return subprocess.Popen([program, *rest], cwd=ROOT, preexec_fn=lambda: os.sched_setaffinity(0, {core}))


def call(core: int, *words: object) -> None:
    """Run a command on one core to its end. Exits if it fails."""
    if start(core, *words).wait():
        raise SystemExit(f"{words[0]} {words[1]} failed")


def capture_slowly(args: argparse.Namespace) -> None:
    """Fill the window, at most `--capture-at` tokens/s."""
    from dump.capture import Staged, Staging
    from dump.hf import Transformers
    from dump.window import Rolling, dump_window
    from recipe.load import load_recipe

    capture = Transformers.capture

    def paced(self: Transformers, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        due = time.monotonic()
        for sample_id, token_ids in samples:
            due = max(due, time.monotonic() - 0.1) + len(token_ids) / args.capture_at
            yield from capture(self, iter([(sample_id, token_ids)]), staging)
            time.sleep(max(0.0, due - time.monotonic()))

    Transformers.capture = paced  # type: ignore[method-assign]
    recipe = load_recipe(args.recipe, args.set)
    dump_window(recipe, args.conversations, args.work / "store", Rolling(int(args.window * 2**30)))


def wait_until_full(store: Path, capture: subprocess.Popen[bytes]) -> None:
    """Wait until the capture waits for the trainer. Exits if it ends."""
    states = [store / "shards/00000-of-00001/capture.json"]
    while not (states[0].exists() and json.loads(states[0].read_text())["waited_s"] > 0):
        if capture.poll() is not None:
            raise SystemExit("the capture ended before its window was full")
        time.sleep(0.2)


class Peak:
    """The largest size of a folder from now on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._largest, self._end = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the largest size in bytes."""
        self._end.set()
        self._thread.join()
        return self._largest

    def _look(self) -> None:
        while not self._end.wait(0.05):
            self._largest = max(self._largest, folder_bytes(self._folder))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files; some may be deleted meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def metrics(draft: Path) -> Sequence[dict[str, float | dict[str, float]]]:
    """Return the lines of metrics.jsonl without the first one, which has the start."""
    return [json.loads(line) for line in (draft / "metrics.jsonl").read_text().splitlines()][1:]


def step_seconds(draft: Path) -> float:
    """Return the mean seconds of a step, with the wait for its samples."""
    lines = metrics(draft)
    return sum(sum(line["seconds"].values()) for line in lines) / len(lines)  # type: ignore[union-attr]


def trained_tokens_per_s(draft: Path) -> float:
    """Return the mean tokens/s of a training."""
    lines = metrics(draft)
    return sum(line["tokens_per_s"] for line in lines) / len(lines)  # type: ignore[misc]


def last_weights(draft: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a training's last checkpoint."""
    return load_file(max(draft.glob("step-*")) / "weights.safetensors")


if __name__ == "__main__":
    arguments = parse_args()
    compare(arguments) if arguments.capture_at is None else capture_slowly(arguments)

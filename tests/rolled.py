"""Rolling stores and what trains on them, and the run on a whole store that they are compared with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import command, run_here
from safetensors.torch import load_file

from serve.server import find_port

SETTINGS = ["--set", "dump.backend=hf", "--set", "train.num_steps=24", "--set", "train.checkpoint_every=1000"]
GIB = 2**30


def write_whole(recipe: Path, conversations: Path, folder: Path) -> Path:
    """A run on a whole store; its folder."""
    args = ["--recipe", recipe, *SETTINGS]
    run_here("dump", "run", *args, "--conversations", conversations, "--output", folder / "store")
    run_here("train", "offline", *args, "--store", folder / "store", "--output", folder / "draft")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "draft/step-000024/weights.safetensors")


def store_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def capture(recipe: Path, conversations: Path, folder: Path, window: float, *more: object) -> list[str]:
    places = ["--conversations", conversations, "--output", folder / "store", "--window", window]
    return command("dump", "run", "--recipe", recipe, *SETTINGS, *places, *more)


def follow(recipe: Path, folder: Path, *more: object) -> list[str]:
    places = ["--store", folder / "store", "--output", folder / "draft", "--follow"]
    return command("train", "offline", "--recipe", recipe, *SETTINGS, *places, *more)


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def names(words: list[str]) -> list[str]:
    """The words of a command with its name in place of its path."""
    return [Path(words[0]).name, *words[1:]]


@contextmanager
def run_master() -> Iterator[str]:
    """The address of a Mooncake master. Skips the test where Mooncake is not installed."""
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    port, metrics = find_port("127.0.0.1", None), find_port("127.0.0.1", None)
    program = str(Path(sys.executable).with_name("mooncake_master"))
    words = [program, "--rpc_address=127.0.0.1", f"--rpc_port={port}", f"--metrics_port={metrics}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1.0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()

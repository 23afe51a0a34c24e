"""Claims about a store that nobody may write to: everything that only reads works on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_here


@pytest.fixture(scope="module")
def store(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished store on a read-only mount, or without write permission where we are not root."""
    original = tmp_path_factory.mktemp("store") / "original"
    args = ("-r", recipe_path, "--conversations", conversations, "--output", original, "--set", "dump.backend=hf")
    run_here("dump", "run", *args)
    folder = original.with_name("read-only")
    if os.geteuid():
        shutil.copytree(original, folder)
        subprocess.run(["chmod", "-R", "a-w", folder], check=True)
        yield folder
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)
        return
    folder.mkdir()
    if subprocess.run(["mount", "--bind", original, folder], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "ledger.jsonl").open("a")
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_verify_proves_it_and_says_that_the_proof_is_not_kept(store: Path, recipe_path: Path) -> None:
    printed = run_here("dump", "verify", "-r", recipe_path, "--store", store).stdout
    assert "60 files whole" in printed
    assert "the proof is not kept: " in printed


def test_inspect_and_stats_show_it(store: Path) -> None:
    assert "60 done" in run_here("dump", "stats", store).stdout
    sample = next((store / "samples").rglob("*.safetensors"))
    assert "norm of layer" in run_here("dump", "inspect", store, sample.stem).stdout


@pytest.mark.parametrize("layout", ["modelopt", "speculators"])
def test_convert_reads_it(store: Path, tmp_path: Path, layout: str) -> None:
    printed = run_here("dump", "convert", store, "--to", layout, "--output", tmp_path / "out").stdout
    assert "60 samples" in printed


def test_a_draft_is_trained_from_it(store: Path, recipe_path: Path, tmp_path: Path) -> None:
    more = ("-r", recipe_path, "--set", "train.num_steps=2")
    run_here("train", "offline", *more, "--store", store, "--output", tmp_path / "draft")
    run_here("train", "eval", *more, "--store", store, "--run", tmp_path / "draft", "--output", tmp_path / "eval.json")

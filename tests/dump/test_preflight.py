"""Claims about the preflight of `dump run`: it names the defect of an engine before anything is stored."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, command, read_lines
from written import write_conversations

pytestmark = pytest.mark.vllm

DEFECTS = {
    "shifted layers": ("the output of layer", "expected the output of layer"),
    "normed final state": ("the final state is normed already", "un-normed"),
    "fp8 KV cache": ("near it, but not exact", "a quantized KV cache"),
    "another checkpoint": ("its states do not predict", "another checkpoint of the target"),
    "short prefix": ("hidden states of ", "a prefix cache that shortens states"),
    "partial sums": ("tensor-parallel rank 1", "partial sums of tensor parallelism"),
}
"""What the message says of each seeded defect: what was found, and the cause."""


@pytest.fixture(scope="module")
def rows(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy replies of the target, behind a prefix longer than a block of the KV cache."""
    return write_conversations(target_folder, tmp_path_factory.mktemp("rows"), 30, shared=150)


def dump(
    recipe: Path, rows: Path, output: Path, *more: str, defect: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    words = command("dump", "run", "-r", recipe, "--conversations", rows, "--output", output, *more)
    seeded = {"PYTHONPATH": str(ROOT / "tests/seeded_defects"), "SEEDED_DEFECT": defect} if defect else {}
    return subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **seeded, **env}
    )


@pytest.mark.long
@pytest.mark.parametrize("defect", DEFECTS)
def test_an_engine_with_a_seeded_defect_is_refused_by_name_before_anything_is_stored(
    recipe_path: Path, other_target_folder: Path, rows: Path, tmp_path: Path, defect: str
) -> None:
    ranks = ("--set", "dump.args.tensor-parallel-size=2") if defect == "partial sums" else ()
    refused = dump(recipe_path, rows, tmp_path, *ranks, defect=defect, SEEDED_CHECKPOINT=str(other_target_folder))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "preflight of vLLM" in refused.stderr
    for words in DEFECTS[defect]:
        assert words in refused.stderr
    assert read_lines(tmp_path / "ledger.jsonl") == []
    assert not (tmp_path / "preflight.json").exists()


def test_a_preflight_is_repeated_only_when_the_engine_or_the_target_changes(
    recipe_path: Path, rows: Path, tmp_path: Path
) -> None:
    args = ("--set", "dump.max_reject_fraction=1")
    first = dump(recipe_path, rows, tmp_path, *args)
    assert "preflight: vLLM predicts the tokens of 4 samples; its layers are transformers'" in first.stdout
    run = json.loads((tmp_path / "run.json").read_text())
    reopen(tmp_path, run)
    again = dump(recipe_path, rows, tmp_path, *args)
    assert again.returncode == 0
    assert "preflight:" not in again.stdout
    reopen(tmp_path, run)
    changed = dump(recipe_path, rows, tmp_path, *args, "--set", "dump.args.max-num-batched-tokens=256")
    assert "preflight: vLLM predicts" in changed.stdout
    assert len(read_lines(tmp_path / "ledger.jsonl")) == 30


def reopen(folder: Path, run: dict[str, object]) -> None:
    """Make the dump unfinished: its last sample is not in the ledger."""
    (folder / "run.json").write_text(json.dumps({**run, "complete": False}))
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines[:-1]))


@pytest.mark.long
def test_a_server_with_extraction_proves_its_states_before_it_is_announced(recipe_path: Path, tmp_path: Path) -> None:
    words = command("serve", "start", "-r", recipe_path, "--extract", tmp_path / "states", "--log", tmp_path / "log")
    seeded = {"PYTHONPATH": str(ROOT / "tests/seeded_defects"), "SEEDED_DEFECT": "normed final state"}
    refused = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **seeded}, timeout=300
    )
    assert refused.returncode == 1
    assert "the final state is normed already" in refused.stderr
    assert "(Ctrl-C stops it)" not in refused.stdout
    good = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert good.stdout is not None
    try:
        printed = [good.stdout.readline() for _ in range(2)]
    finally:
        good.terminate()
        good.wait(60)
    assert "predicts the tokens of 4 samples; its layers are transformers'; the states are whole" in printed[0]
    assert printed[1].endswith("(Ctrl-C stops it)\n")
    assert list((tmp_path / "states").iterdir()) == []

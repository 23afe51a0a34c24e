"""Claims about the preflight of `dump run`: it names the defect of an engine before anything is stored."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, command, read_lines, run_here
from written import write_conversations

from contracts.conversation import Conversation, Sample
from dump.preflight import MAX_TOKENS, choose_rows
from dump.samples import Row
from recipe.load import load_recipe
from target.target import Target

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


@pytest.mark.vllm
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


@pytest.mark.vllm
@pytest.mark.long
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


@pytest.mark.vllm
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


def make_row(number: int, prompt: int, reply: int, temperature: float) -> Row:
    conversation = Conversation(
        id=f"{number:032x}", source_id="", index=number, finish_reason="stop", sampling={"temperature": temperature},
        target={}, template="", usage={},
        samples=[Sample(token_ids=[5] * (prompt + reply), loss_spans=[(prompt, prompt + reply)])],
    )  # fmt: skip
    return Row(f"{conversation.id}-0", conversation, conversation.samples[0])


def test_the_samples_are_the_longest_and_greedy_ones_cut_to_a_length_that_all_ranks_can_write(
    recipe_path: Path,
) -> None:
    recipe = load_recipe(recipe_path, ["target.max_model_len=100000", "train=null"])
    target = Target.read(recipe.target.path)
    target.config["max_position_embeddings"] = 200_000
    rows = [make_row(0, 10, 90, 1.0), make_row(1, 100, 9000, 1.0), make_row(2, 30, 20, 0.0), make_row(3, 5000, 10, 0.0)]
    chosen = choose_rows(recipe, target, rows)
    assert [(row.conversation.index, row.num_tokens) for row in chosen] == [(1, MAX_TOKENS), (2, 50), (0, 100)]
    assert chosen[0].sample.loss_spans == [(100, MAX_TOKENS)]
    assert [row.num_tokens for row in choose_rows(recipe, target, rows[3:])] == [5010]  # there is no other


def test_a_preflight_without_samples_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    refused = run_here("dump", "preflight", "-r", recipe_path, check=False)
    assert refused.returncode == 2
    assert "expected the output of `synth generate`" in refused.stderr
    args = ("-r", recipe_path, "--conversations", tmp_path, "--set", "dump.backend=hf")
    (tmp_path / "conversations.jsonl").write_text("")
    refused = run_here("dump", "preflight", *args, check=False)
    assert refused.returncode == 2
    assert "found no sample to capture" in refused.stderr

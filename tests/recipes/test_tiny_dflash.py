"""Claims about the tiny recipe's target: its prompts, its template, its free rows, and that its training resumes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_target
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from stdlib_corpus import MODES, read_subjects
from transformers import AutoTokenizer

SCRIPT = [sys.executable, str(ROOT / "recipes/Tiny-DFlash/make_target.py"), "--output"]


@pytest.fixture(scope="module")
def tokenizer(target_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(target_folder)


def test_there_are_enough_prompts_and_no_subject_is_in_both_splits(tmp_path: Path) -> None:
    args = make_target.parse_args(["--output", str(tmp_path)])
    make_target.write_prompts(read_subjects(), tmp_path, args.num_train, args.num_held_out)
    splits = {}
    for split in ("train", "held_out"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        splits[split] = {row["id"].partition("/")[2] for row in rows}
        assert len(splits[split]) == len(rows)
    assert len(splits["train"]) >= 600
    assert len(splits["held_out"]) >= 96
    assert not splits["train"] & splits["held_out"]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("enabled", "]~b]ai\n<mm:think>"), ("disabled", "]~b]ai\n</mm:think>"), ("adaptive", "]~b]ai\n")],
)
def test_each_mode_changes_the_prompt_and_its_end_as_m3s_template_does(tokenizer: Any, mode: str, suffix: str) -> None:
    messages = [{"role": "user", "content": "Q"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, thinking_mode=mode, add_generation_prompt=True)
    assert text.startswith(f"]~!b[]~b]system\nThinking mode: {mode}[e~[\n")
    assert text.endswith(suffix)


@pytest.mark.parametrize("mode", MODES)
def test_the_template_only_appends(tokenizer: Any, mode: str) -> None:
    messages, _ = make_target.make_conversation(read_subjects()[50], random.Random(1))
    thought = "why" if mode == "enabled" else None
    reply = {"role": "assistant", "content": "A", **({"reasoning_content": thought} if thought else {})}
    first = tokenizer.apply_chat_template(messages[:2], tokenize=False, thinking_mode=mode, add_generation_prompt=True)
    generated = {"enabled": "why</mm:think>A[e~[", "disabled": "A[e~[", "adaptive": "</mm:think>A[e~["}[mode]
    history = [*messages[:2], reply, {"role": "user", "content": "more"}]
    second = tokenizer.apply_chat_template(history, tokenize=False, thinking_mode=mode, add_generation_prompt=True)
    assert second.startswith(first + generated)


def test_the_generation_tags_mark_what_the_assistant_says(tokenizer: Any) -> None:
    rows = make_target.encode_conversation(read_subjects()[50], tokenizer, random.Random(1))
    ids, labels = rows.unbind(-1)
    spoken = tokenizer.decode(ids[labels >= 0])
    assert spoken.endswith("[e~[")
    assert "</mm:think>" in spoken
    assert "user" not in spoken.split("[e~[")[0].split("</mm:think>")[1]
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])


def test_special_tokens_are_one_token_and_rows_above_them_are_free(tokenizer: Any) -> None:
    for text in ("]~!b[", "[e~[", "]~b]", "<mm:think>", "</mm:think>"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
    assert max(tokenizer.get_vocab().values()) < make_target.NUM_TOKENS < make_target.EMBEDDING_ROWS


@pytest.mark.long
def test_a_killed_target_training_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    sizes = ["--steps", "8", "--checkpoint-every", "3", "--num-train", "4", "--num-held-out", "2"]
    subprocess.run([*SCRIPT, str(tmp_path / "whole"), *sizes], check=True, cwd=ROOT)
    process = subprocess.Popen([*SCRIPT, str(tmp_path / "killed"), *sizes], cwd=ROOT)
    checkpoint = tmp_path / "killed/target.partial/checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    result = subprocess.run(
        [*SCRIPT, str(tmp_path / "killed"), *sizes], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "going on from step" in result.stdout
    whole, killed = (load_file(tmp_path / name / "target/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())

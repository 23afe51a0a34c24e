"""Claims about token exactness, against real vLLM: what is recorded is what the server rendered and generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build_target, read_lines, run_here
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from contracts.conversation import read_conversations
from recipe.load import load_recipe
from serve.command import build_command
from serve.server import find_port, run_server
from target.sampling import Context, probabilities_of
from target.target import Target

pytestmark = [pytest.mark.vllm, pytest.mark.proves("token ids"), pytest.mark.timeout(900)]

MT_BENCH = ROOT.parent / "shared/data/prompts/mt_bench.jsonl"
MODES = (
    "enabled",
    pytest.param("disabled", marks=pytest.mark.long),
    pytest.param("adaptive", marks=pytest.mark.rare),
)
SAMPLED = ("--set", "synth.temperature=1.0", "--set", "synth.max_tokens=64", "--set", "target.max_model_len=4096")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target of long context that ends its turns: every few tokens its end-of-turn logit is the highest."""
    folder = build_target(tmp_path_factory.mktemp("ending-target"), seed=3, max_position_embeddings=8192)
    weights = load_file(folder / "model.safetensors")
    end = Target.read(folder).get("eos_token_id")
    weights["lm_head.weight"][end] *= 6.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.isfinite(weights["lm_head.weight"]).all()
    return folder


@pytest.fixture(scope="module")
def url(target: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    recipe = load_recipe(recipe_path, [f"target.path={target}", "target.max_model_len=4096"])
    command = build_command(recipe, Target.read(target), port=find_port("127.0.0.1", None))
    log = tmp_path_factory.mktemp("server") / "server.log"
    with run_server(command, log_path=log, startup_timeout_s=300) as server:
        yield f"{server.url}/v1"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MT-Bench's two-turn prompts where they are at hand, else such prompts of our own."""
    if MT_BENCH.exists():
        return MT_BENCH
    path = tmp_path_factory.mktemp("prompts") / "two_turns.jsonl"
    rows = [
        {"id": f"p{i}", "turns": [f"Explain thing {i} — at length, in\n{i} lines.", "Once more!"]} for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("mode", MODES)
def test_every_turn_decodes_to_its_text_and_has_the_servers_rendering_as_context(
    recipe_path: Path, target: Path, url: str, prompts: Path, tmp_path: Path, mode: str
) -> None:
    output = tmp_path / mode
    args = ("-r", recipe_path, "--set", f"target.path={target}", *SAMPLED, "--endpoint", url)
    run_here("synth", "generate", *args, "--prompts", prompts, "--output", output, "--thinking-modes", mode)
    printed = run_here("synth", "verify", output, *args).stdout
    counts = json.loads((output / "verified.json").read_text())
    # A random target generates rows at times that no token has; such conversations are filtered.
    filtered = [line["reason"] for line in read_lines(output / "ledger.jsonl") if line["status"] == "filtered"]
    assert all("a row that no token of the tokenizer has" in reason for reason in filtered)
    assert counts["conversations"] + len(filtered) == 80
    assert counts["turns"] == counts["text_equal"] == counts["context_equal"] > 120  # most have both turns
    assert f"{counts['turns']} turns" in printed
    assert {record.thinking_mode for record in read_conversations(output)} == {mode}


def test_verify_names_a_turn_whose_text_or_context_is_not_its_tokens(
    recipe_path: Path, target: Path, url: str, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:4]))
    args = ("-r", recipe_path, "--set", f"target.path={target}", *SAMPLED, "--endpoint", url)
    run_here("synth", "generate", *args, "--prompts", few, "--output", output, "--thinking-modes", "enabled")
    records = read_lines(output / "conversations.jsonl")
    records[0]["thinking_mode"] = "disabled"  # the tokens were made in another mode
    records[1]["messages"][1]["content"] += " "
    (output / "conversations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run_here("synth", "verify", output, *args, check=False)
    assert result.returncode == 1
    assert f"{records[0]['id']} turn 0 (context)" in result.stderr
    assert f"{records[1]['id']} turn 0 (text)" in result.stderr


@torch.inference_mode()
def test_greedy_tokens_are_those_that_the_recorded_penalties_give(
    recipe_path: Path, target: Path, url: str, prompts: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:4]))
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    values = {"temperature": 0, "max_tokens": 64, **penalties}
    more = [word for key, value in values.items() for word in ("--set", f"synth.{key}={value}")]
    args = ("-r", recipe_path, "--set", f"target.path={target}", "--set", "target.max_model_len=4096", *more)
    run_here("synth", "generate", *args, "--endpoint", url, "--prompts", few, "--output", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    changed = 0
    for record in read_conversations(tmp_path / "out"):
        assert {key: record.sampling[key] for key in penalties} == penalties
        for sample in record.samples:
            ids, mask = torch.tensor(sample.token_ids), torch.zeros(len(sample.token_ids), dtype=torch.bool)
            for start, end in sample.loss_spans:
                mask[start:end] = True
            logits = model(ids[None]).logits[0].roll(1, dims=0)[mask]
            found = probabilities_of(record.sampling, logits, Context.of_generated(ids, mask)).argmax(-1)
            assert torch.equal(found, ids[mask])
            changed += int((logits.argmax(-1) != ids[mask]).sum())
    assert changed > 0  # without the penalties, other tokens would be the likeliest

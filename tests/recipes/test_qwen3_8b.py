"""Claims about the recipes for Qwen3-8B: facts and plans without weights, and a README that quotes real output."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_here

from recipe.check import check_recipe
from recipe.init import init_recipe
from recipe.load import load_recipe
from target.size import find_size
from target.target import Target

FOLDER = ROOT / "recipes/Qwen3-8B"
RECIPE = FOLDER / "recipe.yaml"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
"""Of config.json of Qwen/Qwen3-8B."""
QUOTED = re.findall(r"^    \$ (.+)\n((?:    .+\n)+)", README, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with Qwen3-8B's config, and a tokenizer of its ids."""
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocabulary = {f"t{number}": number for number in range(151643)}
    added = [{"id": number, "content": f"<{number}>"} for number in range(151643, 151669)]
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("name", ["recipe.yaml", "eagle3.yaml", "dspark.yaml", "smoke.yaml"])
def test_facts_layers_and_mask_are_those_of_qwen3_8bs_own_files(name: str, folder: Path) -> None:
    recipe = load_recipe(FOLDER / name, [f"target.path={folder}"])
    check_recipe(recipe)
    method = recipe.training().draft.method
    proposed = yaml.safe_load(init_recipe(folder, method, 8).text)
    assert recipe.target.aux_layers == proposed["target"]["aux_layers"]
    assert recipe.target.facts is not None
    facts, sizes = recipe.target.facts, ("num_parameters", "num_active_parameters", "kv_bytes_per_token")
    assert facts.model_dump(exclude_none=True, exclude=set(sizes)) == proposed["target"]["facts"]
    counted = find_size(Target.read(folder))
    stated = [getattr(facts, name) for name in sizes]
    assert stated == pytest.approx([counted.parameters, counted.active, counted.kv_bytes], rel=0.01)
    if method != "eagle3":
        assert recipe.target.mask_token_id == proposed["target"]["mask_token_id"]
    draft = recipe.training().draft.model_dump()
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        assert draft[key] == proposed["train"]["draft"][key]


def test_the_readme_quotes_what_the_plans_print() -> None:
    assert [command.split()[0] for command, _ in QUOTED] == ["dump", "train"]
    for command, quoted in QUOTED:
        printed = run_here(*shlex.split(command)).stdout
        assert re.sub(r"^    ", "", quoted, flags=re.MULTILINE) == printed, command


@pytest.mark.parametrize(("gpus", "accumulate"), [(8, 1), (1, 8)])
@pytest.mark.parametrize("name", ["recipe.yaml", "eagle3.yaml", "dspark.yaml"])
def test_the_readmes_table_has_the_planned_hours_disk_and_peak(name: str, gpus: int, accumulate: int) -> None:
    accumulate *= load_recipe(FOLDER / name).training().gradient_accumulation_steps
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` | ") and "TB" in line)
    disk, *hours, peak = re.findall(r"([\d.]+) (?:TB|hours|GB)", row)
    of = ["-r", FOLDER / name, "--set", f"train.gradient_accumulation_steps={accumulate}"]
    arguments = [*of, "--gpu", "h100", "--gpus", gpus, "--mean-tokens", 1000, "--read-rate", 10, "--json"]
    plan = json.loads(run_here("train", "plan", *arguments).stdout)
    seconds = max(plan["seconds_per_step"].values())
    assert f"{seconds * plan['num_steps'] / 3600:.1f}" == hours[0 if gpus == 8 else 1]
    assert all(plan["fits"].values())
    if gpus == 8:
        assert round(sum(plan["memory_bytes"]["ddp x8"].values()) / 1e9) == int(peak)
    printed = run_here("dump", "plan", *of, "--samples", 100000, "--mean-tokens", 1000).stdout
    stored = int(re.findall(r"bytes +(\d+)", printed)[0])
    assert f"{stored / 1e12:.1f}" == disk


def test_the_smoke_run_fits_on_one_gpu() -> None:
    arguments = ["-r", FOLDER / "smoke.yaml", "--gpu", "h100", "--gpus", 1, "--json"]
    assert json.loads(run_here("train", "plan", *arguments).stdout)["fits"] == {"single": True}


def test_steps_are_the_epochs_that_the_comments_name() -> None:
    for name, epochs, share in (("recipe.yaml", 6, 0.04), ("eagle3.yaml", 10, 0.02), ("dspark.yaml", 10, 0.04)):
        train = load_recipe(FOLDER / name).training()
        assert 0 <= epochs * 100_000 - train.num_steps * train.global_batch_size < train.global_batch_size
        assert train.warmup_steps == round(share * train.num_steps)


def test_the_published_drafts_are_served_with_all_their_tokens() -> None:
    command = run_here("serve", "command", "-r", RECIPE, "--draft", "dflash", "--for", "production").stdout
    assert '"model": "z-lab/Qwen3-8B-DFlash-b16", "num_speculative_tokens": 15' in command
    for flag in ("--max-model-len 40960", "--reasoning-parser qwen3", "--tool-call-parser hermes"):
        assert flag in command


def test_every_yaml_says_what_it_is() -> None:
    for path in FOLDER.glob("*.yaml"):
        assert path.read_text().startswith("# ")

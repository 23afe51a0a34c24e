"""Claims about the recipes for MiniMax-M3: checked rule by rule, and run on a tiny M3 through the very recipe file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run, run_here
from tiny_m3 import HIDDEN, NUM_LAYERS, build_tiny_m3
from transformers import AutoConfig
from written import write_conversations

from common.errors import UserError
from recipe.check import check_recipe
from recipe.load import load_recipe
from target.mask_token import used_token_ids
from target.target import Target

FOLDER = ROOT / "recipes/MiniMax-M3-DFlash"
RECIPE = FOLDER / "recipe.yaml"


@pytest.fixture(autouse=True)
def _in_the_projects_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tiny_m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_m3(tmp_path_factory.mktemp("m3") / "target")


def sizes_of(target_folder: Path) -> list[str]:
    """--set values that bring the recipe down to the tiny M3's sizes."""
    highest = max(used_token_ids(Target.read(target_folder)))
    values = {
        "target.path": target_folder, "target.max_model_len": 512, "target.aux_layers": [0, 2, 4],
        "target.mask_token_id": highest + 1, "target.facts.hidden_size": HIDDEN, "target.facts.vocab_size": 1024,
        "target.facts.num_hidden_layers": NUM_LAYERS, "target.facts.highest_token_id": highest,
        "dump.args.dtype": "float32", "dump.dtype": "float32", "train.draft.num_layers": 2,
        "train.draft.num_attention_heads": 4, "train.draft.num_key_value_heads": 2, "train.draft.head_dim": 32,
        "train.draft.intermediate_size": 512, "train.draft.num_anchors": 32,
        "train.global_batch_size": 8, "train.num_steps": 250, "train.warmup_steps": 10, "train.learning_rate": 6e-3,
        "train.held_out_fraction": 0, "train.evaluate_every": 0, "export.dtype": "float32",
        "export.max_position_embeddings": 65536, "export.yarn.original_max_position_embeddings": 512,
    }  # fmt: skip
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def test_a_tiny_m3_goes_through_the_recipe_from_end_to_end(tiny_m3: Path, tmp_path: Path) -> None:
    args = ["--recipe", RECIPE, *sizes_of(tiny_m3)]
    conversations = write_conversations(tiny_m3, tmp_path / "conversations", 50)
    run("recipe", "check", *args)
    run_here("dump", "run", *args, "--backend", "hf", "--conversations", conversations, "--output", tmp_path / "store")
    printed = run_here("dump", "verify", *args, "--store", tmp_path / "store").stdout
    assert "500 of 500 generated tokens of 50 greedy samples are the states' argmax" in printed
    assert "all layers of 8 samples are as transformers computes them" in printed
    assert json.loads((tmp_path / "store/manifest.json").read_text())["final_norm"] == "gemma"
    run_here("train", "offline", *args, "--store", tmp_path / "store", "--output", tmp_path / "draft")
    evaluation = tmp_path / "eval.json"
    run_here("train", "eval", *args, "--run", tmp_path / "draft", "--store", tmp_path / "store", "--output", evaluation)
    assert json.loads(evaluation.read_text())["acceptance_length"] > 1.5
    export = tmp_path / "export"
    run_here("train", "export", *args, "--run", tmp_path / "draft", "--output", export, "--eval", evaluation)

    config = json.loads((export / "config.json").read_text())
    highest = max(used_token_ids(Target.read(tiny_m3)))
    assert config["dflash_config"] == {"mask_token_id": highest + 1, "target_layer_ids": [0, 2, 4]}
    assert config["max_position_embeddings"] == 65536
    for schema in ("rope_parameters", "rope_scaling"):
        rope = config[schema]
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 128.0, 5e6)
        assert rope["original_max_position_embeddings"] == 512
    loaded = AutoConfig.from_pretrained(export)
    assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.rope_parameters["factor"]) == (HIDDEN, 2, 128.0)

    command = run("serve", "command", *args, "--draft", export).stdout
    assert '"num_speculative_tokens": 7, "attention_backend": "FLASH_ATTN"' in command


BROKEN = {
    "an unknown key": ("train.draft.num_anchor", 3, r"unknown key 'num_anchor'.*Did you mean 'num_anchors'"),
    "layers out of order": (
        "target.aux_layers",
        [15, 1],
        r"aux_layers: found \[15, 1\], expected sorted, unique",
    ),
    "a layer twice": ("target.aux_layers", [1, 1], r"target.aux_layers: found \[1, 1\], expected sorted, unique"),
    "a layer beyond the last": ("target.aux_layers", [1, 59], r"unique layers from 0 to 58"),
    "a mask token in use": ("target.mask_token_id", 200054, r"found a token of the tokenizer"),
    "a mask token without a row": ("target.mask_token_id", 200064, r"found no row in 200064 embedding rows"),
    "a window that is not the context": ("export.yarn.factor", 64, r"export.yarn: found 8192 x 64 = 524288 positions"),
    "a mode twice": ("synth.thinking_modes", ["enabled", "enabled"], r"'enabled' is listed twice"),
    "a variable the template lacks": (
        "target.thinking_mode_name",
        "thinking",
        r"expected a variable of the chat",
    ),
    "no template": ("target.training_template", "none.jinja", r"target.training_template: found no none.jinja"),
    "a template without tags": ("target.training_template", "README.md", r"found no \{% generation %\} tags"),
    "a changed template": ("target.training_template_sha256", "00", r"training_template_sha256: found 00, expected"),
    "another block": ("serve.args.block-size", 64, r"serve.args.block-size: found 64, expected 128"),
    "another block in the dump": ("dump.args.block-size", 16, r"dump.args.block-size: found 16, expected 128"),
    "a quantized cache": ("dump.args.kv-cache-dtype", "fp8", r"kv-cache-dtype: found fp8, expected a KV cache of"),
    "heads that do not divide": ("train.draft.num_key_value_heads", 7, r"must be a multiple of num_key_value_heads"),
}


def test_a_draft_that_knows_more_tokens_than_the_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.draft.draft_vocab_size: found 200065, expected at most the target's"):
        check_recipe(load_recipe(RECIPE.with_name("eagle3.yaml"), ["train.draft.draft_vocab_size=200065"]))


@pytest.mark.parametrize("rule", BROKEN)
def test_each_broken_rule_has_its_own_message(rule: str, tmp_path: Path) -> None:
    key, value, message = BROKEN[rule]
    more = ["target.training_template_sha256=null"] if rule == "a template without tags" else []
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(RECIPE, [f"{key}={json.dumps(value)}", *more]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "Other"), ("hidden_size", 65), ("num_hidden_layers", 7), ("vocab_size", 1025),
        ("rope_theta", 1e4), ("final_norm", "rms"), ("highest_token_id", 1018), ("sparse_block_size", 64),
    ],
)  # fmt: skip
def test_facts_that_are_not_the_targets_are_refused(tiny_m3: Path, name: str, value: Any) -> None:
    values = sizes_of(tiny_m3)[1::2]
    check_recipe(load_recipe(RECIPE, values))
    with pytest.raises(UserError, match=f"target.facts.{name}: found {value}, expected .*, as in "):
        check_recipe(load_recipe(RECIPE, [*values, f"target.facts.{name}={value}"]))


def test_a_training_template_that_renders_otherwise_than_the_targets_is_refused(tiny_m3: Path, tmp_path: Path) -> None:
    values = sizes_of(tiny_m3)[1::2]
    text = (ROOT / "chat_templates/minimax_m3.jinja").read_text()
    (tmp_path / "near.jinja").write_text(text.replace("You MUST think", "You must think"))
    values += [f"target.training_template={tmp_path / 'near.jinja'}", "target.training_template_sha256=null"]
    with pytest.raises(UserError, match=r"for probe 0, mode enabled: .*You must.*expected .*You MUST"):
        check_recipe(load_recipe(RECIPE, values))


def test_a_base_is_laid_under_and_every_value_tells_its_file(tmp_path: Path) -> None:
    smoke, whole = load_recipe(FOLDER / "smoke.yaml"), load_recipe(RECIPE)
    assert (smoke.target, smoke.dump, smoke.export) == (whole.target, whole.dump, whole.export)
    assert smoke.training().num_steps == 60
    shown = run("recipe", "show", "--recipe", FOLDER / "smoke.yaml", "--set", "train.seed=3").stdout
    lines = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in shown.splitlines() if "#" in line}
    assert (lines["num_steps"], lines["loss_decay"], lines["seed"], lines["dpace_smoothing"]) == (
        "smoke.yaml", "recipe.yaml", "--set", "default",
    )  # fmt: skip
    (tmp_path / "shown.yaml").write_text(shown)
    loaded = load_recipe(FOLDER / "smoke.yaml", ["train.seed=3"])
    assert load_recipe(tmp_path / "shown.yaml").redacted() == loaded.redacted()
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(UserError, match=r"found loop\.yaml, expected another recipe"):
        load_recipe(tmp_path / "loop.yaml")


def test_the_eagle3_recipe_reads_the_layers_of_the_published_head() -> None:
    recipe = load_recipe(FOLDER / "eagle3.yaml")
    assert [layer_id + 1 for layer_id in recipe.target.aux_layers or []] == [2, 30, 57]
    train = recipe.training()
    assert train.warmup_steps == round(0.02 * train.num_steps)
    assert 0 <= 456_881 - train.num_steps * train.global_batch_size < train.global_batch_size


def test_the_dspark_recipe_is_modelopts_with_the_decay_and_anchors_of_its_block_size() -> None:
    recipe = load_recipe(FOLDER / "dspark.yaml")
    check_recipe(recipe)
    assert [layer_id + 1 for layer_id in recipe.target.aux_layers or []] == [2, 13, 24, 36, 47, 58]
    draft = recipe.training().draft.model_dump()
    assert draft["num_speculative_tokens"] == 8
    assert (draft["loss_decay"], draft["num_anchors"], draft["objective"]) == (4.0, 512, {"tokens": 0.1, "tv": 1.8})


def test_every_yaml_says_where_its_values_come_from() -> None:
    for path in FOLDER.glob("*.yaml"):
        assert path.read_text().startswith("# ")
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_recipe_check_and_serve_tell_that_layers_are_captured_before_their_all_reduce() -> None:
    told = "captures the layers of MiniMaxM3SparseForConditionalGeneration before their all-reduce over 8"
    assert told in run_here("recipe", "check", "-r", RECIPE).stdout
    one = run_here("recipe", "check", "-r", RECIPE, "--set", "serve.args.tensor-parallel-size=1")
    assert "note:" not in one.stdout
    assert told in run_here("serve", "command", "-r", RECIPE, "--extract", "states").stderr
    assert "note:" not in run_here("serve", "command", "-r", RECIPE, "--for", "synth").stderr

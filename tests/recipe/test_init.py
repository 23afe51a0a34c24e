"""Claims about `recipe init`: its recipe has the target's facts, and checks and plans need no more than a config."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_here
from tiny_m3 import m3_config

from common.errors import UserError
from drafts import METHODS
from recipe.check import check_recipe
from recipe.init import init_recipe
from recipe.load import load_recipe
from recipe.recipe import Recipe
from target.modes import find_modes
from target.templates import values_of
from target.thinking import find_tags

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
LLAMA: dict[str, Any] = {  # no head_dim, as in Llama 3's config
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "vocab_size": 256000, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
}  # fmt: skip
M3 = m3_config(200064)
M3["text_config"] |= {
    "hidden_size": 6144, "num_hidden_layers": 60, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 3072, "dense_intermediate_size": 12288, "num_local_experts": 128,
    "max_position_embeddings": 1048576,
}  # fmt: skip
CONFIGS = {"Qwen3-8B": QWEN3, "Llama-3.1-8B": LLAMA, "gemma-2-2b": GEMMA, "MiniMax-M3": M3}

SWITCHED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}{% endif %}"
)
"""As Qwen3's template switches its reasoning."""


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_tokenizer(folder: Path, highest: int) -> None:
    vocabulary = {f"t{number}": number for number in range(4)}
    added = [{"id": highest, "content": "<last>"}]
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def load(target: Path, folder: Path, method: str = "dflash", gpus: int = 8) -> Recipe:
    """The recipe that `recipe init` writes, loaded from a file in `folder`."""
    path = folder / "recipe.yaml"
    path.write_text(init_recipe(target, method, gpus).text)
    return load_recipe(path)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if name == "Qwen3-8B" or method == "dflash" else pytest.mark.rare)
        for name, method in product(CONFIGS, METHODS)
    ],
)
def test_a_config_alone_is_enough_for_check_and_every_plan(name: str, method: str, tmp_path: Path) -> None:
    folder, recipe = write_config(tmp_path / name, CONFIGS[name]), tmp_path / "recipe.yaml"
    printed = run_here("recipe", "init", folder / "config.json", "--method", method, "--gpus", 8, "-o", recipe).stdout
    assert "also need the weights, tokenizer.json and the chat template of" in printed
    assert f"hf download ORG/NAME --local-dir {folder}" in printed
    assert run_here("recipe", "check", "-r", recipe).stdout.startswith(f"{recipe}: ok")
    assert "samples      10 " in run_here("dump", "plan", "-r", recipe, "--samples", 10).stdout
    plan = json.loads(run_here("train", "plan", "-r", recipe, "--gpu", "h100", "--gpus", 8, "--json").stdout)
    assert plan["fits"]["ddp x8"]
    takes_8k1k = CONFIGS[name].get("max_position_embeddings") != 8192
    assert ("8k1k-tp" in run_here("bench", "plan", "-r", recipe).stdout) == takes_8k1k
    (folder / "config.json").unlink()
    assert "as far as it goes without the files of" in run_here("recipe", "check", "-r", recipe).stdout
    run_here("dump", "plan", "-r", recipe, "--samples", 10)
    run_here("train", "plan", "-r", recipe, "--gpu", "h100")
    assert "1k1k-tp" in run_here("bench", "plan", "-r", recipe).stdout


def test_dimensions_layers_norm_and_rope_are_the_targets(tmp_path: Path) -> None:
    qwen = load(write_config(tmp_path / "qwen", QWEN3), tmp_path)
    draft: Any = qwen.training().draft
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim) == (32, 8, 128)
    assert (draft.intermediate_size, draft.num_layers, qwen.target.aux_layers) == (12288, 5, [1, 9, 17, 25, 33])
    assert qwen.target.facts is not None
    assert (qwen.target.facts.rope_theta, qwen.target.facts.final_norm) == (1e6, "rms")
    llama: Any = load(write_config(tmp_path / "llama", LLAMA), tmp_path).training().draft
    assert (llama.head_dim, llama.intermediate_size) == (128, 14336)
    gemma = load(write_config(tmp_path / "gemma", GEMMA), tmp_path)
    assert gemma.target.facts is not None
    assert (gemma.target.facts.final_norm, gemma.training().draft.num_layers) == ("gemma", 4)  # type: ignore[attr-defined]


def test_an_eagle3_recipe_reads_a_low_a_middle_and_a_high_layer_and_has_no_mask(tmp_path: Path) -> None:
    recipe = load(write_config(tmp_path / "qwen", QWEN3), tmp_path, "eagle3")
    assert (recipe.target.aux_layers, recipe.target.mask_token_id) == ([1, 17, 32], None)
    assert recipe.training().draft.draft_vocab_size == 32000  # type: ignore[attr-defined]


def test_m3s_facts_are_those_of_its_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_config(tmp_path / "MiniMax-M3", M3)
    add_tokenizer(folder, 200060)
    (folder / "chat_template.jinja").write_text((ROOT / "chat_templates/minimax_m3.jinja").read_text())
    ours = load(folder, tmp_path)
    monkeypatch.chdir(ROOT)
    shipped = load_recipe(ROOT / "recipes/MiniMax-M3-DFlash/recipe.yaml")
    assert shipped.target.facts is not None
    sizes = ("num_parameters", "num_active_parameters", "kv_bytes_per_token")  # for plans without the config
    assert ours.target.facts == shipped.target.facts.model_copy(update=dict.fromkeys(sizes))
    for key in ("aux_layers", "mask_token_id", "thinking_mode_name", "max_model_len"):
        assert getattr(ours.target, key) == getattr(shipped.target, key), key
    assert (ours.synth.thinking_modes, ours.export) == (shipped.synth.thinking_modes, shipped.export)
    assert ours.target.thinking_tags == ("<mm:think>", "</mm:think>")
    assert ours.training().draft.intermediate_size == 12288  # type: ignore[attr-defined]
    assert ours.serve.args == {"tensor-parallel-size": 8, "block-size": 128, "language-model-only": True}
    assert "8 x h100 do not hold the target's weights" in " ".join(init_recipe(folder, "dflash", 8).notes)


def test_the_mlp_of_a_draft_is_not_as_narrow_as_an_expert(tmp_path: Path) -> None:
    config = {**QWEN3, "hidden_size": 2048, "intermediate_size": 768, "num_experts": 128}
    draft: Any = load(write_config(tmp_path / "moe", config), tmp_path).training().draft
    assert draft.intermediate_size == 6144
    config |= {"intermediate_size": 6000, "moe_intermediate_size": 768}
    named: Any = load(write_config(tmp_path / "named", config), tmp_path).training().draft
    assert named.intermediate_size == 6000


def test_the_tokenizer_gives_the_mask_and_generation_config_the_sampling(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "qwen", QWEN3)
    add_tokenizer(folder, 151668)
    (folder / "chat_template.jinja").write_text(SWITCHED)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    recipe = load(folder, tmp_path)
    assert recipe.target.mask_token_id == 151669
    assert (recipe.synth.temperature, recipe.synth.top_p, recipe.synth.top_k) == (0.6, 0.95, 20)
    assert recipe.synth.repetition_penalty is None
    assert (recipe.synth.thinking_modes, recipe.target.thinking_mode_name) == (
        ["enabled", "disabled"],
        "enable_thinking",
    )
    assert recipe.target.thinking_mode_values == {"enabled": True, "disabled": False}
    assert recipe.target.thinking_tags == ("<think>", "</think>")
    (note,) = init_recipe(folder, "dflash", 8).notes
    assert note.startswith("`synth generate` and `dump run` also need the weights of")


def test_a_guess_is_refused_once_the_tokenizer_is_there(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "qwen", QWEN3)
    recipe = load(folder, tmp_path)
    assert recipe.target.mask_token_id == 151935
    check_recipe(recipe)
    add_tokenizer(folder, 151668)
    with pytest.raises(UserError, match=r"target.facts.highest_token_id: found 151934, expected 151668, as in"):
        check_recipe(recipe)


def test_facts_are_compared_with_a_config_that_came_without_its_tokenizer(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "qwen", QWEN3)
    recipe = load(folder, tmp_path)
    (folder / "config.json").write_text(json.dumps({**QWEN3, "hidden_size": 5120}))
    with pytest.raises(UserError, match=r"target.facts.hidden_size: found 4096, expected 5120"):
        check_recipe(recipe)


def test_yarn_is_for_contexts_of_more_than_four_times_the_trained_length(tmp_path: Path) -> None:
    for context, factor in ((4096, None), (8192, None), (32768, None), (40960, 5.0), (131072, 16.0)):
        folder = write_config(tmp_path / str(context), {**QWEN3, "max_position_embeddings": context})
        recipe = load(folder, tmp_path)
        assert recipe.target.max_model_len == min(context, 8192)
        assert (recipe.export.yarn.factor if recipe.export.yarn else None) == factor
        assert (recipe.export.max_position_embeddings or recipe.target.max_model_len) == context


def test_gpus_are_divided_between_ranks_that_hold_the_weights_and_replicas(tmp_path: Path) -> None:
    small, large = write_config(tmp_path / "small", QWEN3), write_config(tmp_path / "large", QWEN3)
    index = {"metadata": {"total_size": 140_000_000_000}}
    (large / "model.safetensors.index.json").write_text(json.dumps(index))
    (large / "model-00001-of-00030.safetensors").write_bytes(bytes(8))  # the download is not complete
    recipe = load(small, tmp_path, gpus=1)
    assert (recipe.serve.args, recipe.serve.purposes, recipe.dump.engines) == ({"tensor-parallel-size": 1}, {}, 1)
    for gpus in (1, 2, 3, 8):
        train = load(small, tmp_path, gpus=gpus).training()
        assert train.batch_size == gpus
        assert abs(train.global_batch_size - 16) <= gpus / 2
    recipe = load(large, tmp_path, gpus=8)
    assert recipe.serve.args == {"tensor-parallel-size": 4}
    assert recipe.serve.purposes["synth"].args == {"data-parallel-size": 2}


def test_the_tiny_target_of_the_tests_gets_a_recipe_for_its_five_layers(target_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    printed = run_here("recipe", "init", target_folder, "-o", path).stdout
    assert "also need" not in printed
    recipe = load_recipe(path)
    assert recipe.target.aux_layers == [1, 2]
    assert recipe.synth.thinking_modes == ["enabled", "disabled", "adaptive"]
    assert run_here("recipe", "check", "-r", path).stdout.startswith(f"{path}: ok\n")
    run_here("dump", "plan", "-r", path, "--samples", 10)
    run_here("train", "plan", "-r", path, "--gpu", "cpu", "--gpus", 1)


def test_every_value_is_commented_or_speaks_for_itself_and_lines_are_short(tmp_path: Path) -> None:
    text = init_recipe(write_config(tmp_path / "qwen", QWEN3), "dflash", 8).text
    assert max(map(len, text.splitlines())) <= 120
    assert "num_steps: 18750" in text
    assert "assumed" in next(line for line in text.splitlines() if "num_steps" in line)
    assert isinstance(yaml.safe_load(text), dict)


def test_a_file_is_overwritten_only_with_force_and_without_a_file_the_recipe_is_all_of_stdout(tmp_path: Path) -> None:
    folder, path = write_config(tmp_path / "qwen", QWEN3), tmp_path / "mine.yaml"
    path.write_text("mine")
    refused = run_here("recipe", "init", folder, "-o", path, check=False)
    assert (refused.returncode, path.read_text()) == (2, "mine")
    assert "Choose another name, or pass --force" in refused.stderr
    run_here("recipe", "init", folder, "-o", path, "--force")
    printed = run_here("recipe", "init", folder)
    assert printed.stdout == path.read_text()
    assert "train plan -r recipe.yaml --gpu h100 --gpus 1" in printed.stderr


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["Org/Nowhere"], r'in the hub\'s cache.*hf download Org/Nowhere --include "\*.json" --include "\*.jinja"'),
        (["/nowhere/at/all"], r"found no config.json, expected a folder or hub name of a model"),
        (
            [".", "--method", "medusa"],
            r"--method: found medusa, expected one of dflash, dflash2, dspark, eagle3, lilicorr, peagle",
        ),
    ],
)
def test_what_cannot_become_a_recipe_costs_one_line(arguments: list[str], telling: str) -> None:
    result = run_here("recipe", "init", *arguments, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert re.search(telling, result.stderr)


def test_a_hub_name_is_found_in_the_cache_and_stays_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--Qwen--Qwen3-8B"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    write_config(repo / "snapshots/abc", QWEN3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    new = init_recipe(Path("Qwen/Qwen3-8B"), "dflash", 1)
    assert yaml.safe_load(new.text)["target"]["path"] == "Qwen/Qwen3-8B"
    assert new.notes[-1].endswith("of Qwen/Qwen3-8B: hf download Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("template", "name", "modes", "tags"),
    [
        (SWITCHED, "enable_thinking", ["enabled", "disabled"], ("<think>", "</think>")),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ '</think>' if not thinking }}",
         "thinking", ["enabled", "disabled"], ("<think>", "</think>")),
        ("{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
         "{{ reasoning_effort }}<|channel|>analysis<|message|>", "reasoning_effort", ["low", "medium", "high"],
         ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")),
        ("{% set mode = thinking_mode | default('fast') %}{% if mode == 'slow' %}[THINK]{% endif %}[/THINK]",
         "thinking_mode", ["slow", "fast"], ("[THINK]", "[/THINK]")),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None, [], None),
    ],
)  # fmt: skip
def test_modes_and_tags_are_those_of_the_chat_template(
    template: str, name: str | None, modes: list[str], tags: tuple[str, str] | None
) -> None:
    found = find_modes(template)
    assert (found.name if found else None, found.modes if found else []) == (name, modes)
    assert find_tags(template) == tags


def test_a_target_without_weights_is_checked_without_importing_torch(tmp_path: Path) -> None:
    folder, path = write_config(tmp_path / "qwen", QWEN3), tmp_path / "recipe.yaml"
    path.write_text(init_recipe(folder, "dflash", 1).text)
    code = (
        "import sys, pathlib, recipe.cli; recipe.cli.check(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, cwd=ROOT)


def test_values_of_an_argument_are_followed_through_assignments() -> None:
    template = "{% set a = x | default('one') %}{% if a in ['one', 'two'] or y == 'three' %}{% endif %}"
    assert values_of(template, "x") == ["one", "two"]
    with pytest.raises(UserError, match=r"the chat template: found .* in line 1, expected a jinja template"):
        values_of("{% if %}", "x")

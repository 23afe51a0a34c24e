"""Claims about bases of another target: their facts are refused, all others are inherited."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, run_here

from common.errors import UserError
from recipe.load import load_recipe

M3 = ROOT / "recipes/MiniMax-M3-DFlash/recipe.yaml"
OWN_FACTS = """
  facts: {architecture: Qwen3ForCausalLM, hidden_size: 4096, num_hidden_layers: 36, vocab_size: 151936,
          rope_theta: 1.0e+6, final_norm: rms, highest_token_id: 151668, sparse_block_size: null,
          num_parameters: null, num_active_parameters: null, kv_bytes_per_token: null}
  aux_layers: null
  mask_token_id: null
  training_template: null
  training_template_sha256: null
"""


def write_child(folder: Path, target: str, base: Path | str = M3) -> Path:
    path = folder / "child.yaml"
    path.write_text(f"base: {base}\ntarget:\n  path: {target}\n")
    return path


def test_m3s_recipe_as_the_base_of_another_target_is_refused_with_every_fact_it_would_bring(tmp_path: Path) -> None:
    result = run_here("recipe", "check", "-r", write_child(tmp_path, "Qwen/Qwen3-8B"), check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert (
        "(target.path Qwen/Qwen3-8B): found facts of another target, MiniMaxAI/MiniMax-M3, taken from" in result.stderr
    )
    for fact in ("facts.final_norm", "facts.sparse_block_size", "aux_layers", "mask_token_id", "training_template"):
        assert f"target.{fact}" in result.stderr
    assert "recipe init Qwen/Qwen3-8B" in result.stderr


def test_a_recipe_with_facts_of_its_own_inherits_the_rest(tmp_path: Path) -> None:
    path = write_child(tmp_path, "Qwen/Qwen3-8B" + OWN_FACTS)
    recipe = load_recipe(path)
    assert recipe.target.facts is not None
    assert (recipe.target.facts.final_norm, recipe.target.aux_layers) == ("rms", None)
    assert recipe.synth.thinking_modes == ["enabled", "disabled", "adaptive"]


def test_a_single_fact_that_is_left_is_named_alone_and_may_come_from_set(tmp_path: Path) -> None:
    path = write_child(tmp_path, "Qwen/Qwen3-8B" + OWN_FACTS.replace("  mask_token_id: null\n", ""))
    with pytest.raises(UserError, match=r"taken from .*recipe.yaml: target.mask_token_id, expected facts of its own"):
        load_recipe(path)
    assert load_recipe(path, ["target.mask_token_id=151669"]).target.mask_token_id == 151669
    path.write_text(path.read_text().replace("hidden_size: 4096, ", ""))
    with pytest.raises(UserError, match=r": target.facts.hidden_size, target.mask_token_id, expected"):
        load_recipe(path)


@pytest.mark.parametrize(
    "path",
    ["/data/models/MiniMax-M3", "minimax-m3", "/cache/models--MiniMaxAI--MiniMax-M3/snapshots/0123abc"],
)
def test_a_copy_of_the_target_in_another_folder_keeps_the_facts(path: str, tmp_path: Path) -> None:
    assert load_recipe(write_child(tmp_path, path)).target.mask_token_id == 200061
    assert load_recipe(M3, [f"target.path={path}"]).target.mask_token_id == 200061


def test_a_base_of_a_base_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "between.yaml").write_text(f"base: {M3}\ntarget: {{aux_layers: [1, 9]}}\n")
    with pytest.raises(UserError, match=r"facts of another target.*target.mask_token_id") as raised:
        load_recipe(write_child(tmp_path, "Qwen/Qwen3-8B", "between.yaml"))
    assert "aux_layers" in str(raised.value)


def test_facts_of_a_base_without_a_target_are_general(tmp_path: Path) -> None:
    (tmp_path / "general.yaml").write_text("target: {final_norm: rms}\n")
    assert load_recipe(write_child(tmp_path, "Qwen/Qwen3-8B", "general.yaml")).target.final_norm == "rms"

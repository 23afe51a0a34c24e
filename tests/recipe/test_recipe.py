"""Claims about recipes: what is wrong is named, what is right is resolved, in the promised order of precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run

from common.errors import UserError
from recipe.check import check_recipe
from recipe.load import load_recipe
from recipe.recipe import Recipe
from serve.engine import engine_env

TINY = ROOT / "recipes/Tiny-DFlash/recipe.yaml"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_recipe_loads_and_passes_its_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_recipe(load_recipe(path))


def test_an_unknown_key_is_an_error_that_names_the_nearest_key() -> None:
    with pytest.raises(UserError, match=r"train\.draft\.blok_size.*'blok_size'.*Did you mean 'block_size'"):
        load_recipe(TINY, ["train.draft.blok_size=8"])


def test_an_unknown_section_is_an_error_that_names_the_nearest_section() -> None:
    with pytest.raises(UserError, match="Did you mean 'train'"):
        load_recipe(TINY, ["trian.num_steps=8"])


def test_a_value_of_the_wrong_kind_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match=r"train\.num_steps.*'many'"):
        load_recipe(TINY, ["train.num_steps=many"])


def test_flags_win_over_set_which_wins_over_the_recipe() -> None:
    def num_steps(*args: Any) -> int:
        return load_recipe(TINY, *args).training().num_steps

    assert num_steps() == 800
    assert num_steps(["train.num_steps=4"]) == 4
    assert num_steps(["train.num_steps=4"], {"train.num_steps": 6}) == 6
    assert num_steps(["train.num_steps=4"], {"train.num_steps": None}) == 4


OLD = """
target: {path: here}
train: {method: dflash, block_size: 8, batch_samples: 4, accumulate: 2, schedule: wsd, num_steps: 3}
dump: {requests_in_flight: 8}
"""


def test_a_recipe_of_an_earlier_version_gets_one_message_that_names_every_new_key(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    result = run("recipe", "check", "--recipe", tmp_path / "old.yaml", check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    for renamed in (
        "train.method to train.draft.method", "train.block_size to train.draft.block_size",
        "train.batch_samples to train.global_batch_size", "train.schedule to train.lr_schedule",
        "train.accumulate to train.gradient_accumulation_steps", "dump.requests_in_flight to dump.concurrency",
    ):  # fmt: skip
        assert renamed in result.stderr
    with pytest.raises(UserError, match=r"--set train.method=eagle3.*rename train.method to train.draft.method"):
        load_recipe(TINY, ["train.method=eagle3"])


def test_another_method_keeps_the_keys_that_both_have_and_drops_the_others() -> None:
    draft = load_recipe(TINY, ["train.draft.method=eagle3", "train.draft.ttt_length=3"]).training().draft
    assert draft.method == "eagle3"
    assert (draft.num_attention_heads, draft.head_dim, draft.ttt_length) == (4, 64, 3)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"train\.draft\.num_anchors.*unknown key"):
        load_recipe(TINY, ["train.draft.method=eagle3", "train.draft.num_anchors=3"])


def test_an_unknown_method_is_named_with_those_that_are_known() -> None:
    known = "dflash, dflash2, dspark, eagle3, lilicorr, peagle"
    with pytest.raises(UserError, match=rf"train\.draft.*method is 'medusa'; known methods: {known}"):
        load_recipe(TINY, ["train.draft.method=medusa"])


def test_a_recipe_for_synthesis_needs_no_training_section(tmp_path: Path) -> None:
    (tmp_path / "synth.yaml").write_text("target: {path: here}\nsynth: {temperature: 0.5}\n")
    recipe = load_recipe(tmp_path / "synth.yaml")
    check_recipe(recipe)
    with pytest.raises(UserError, match="train: found no such section in the recipe"):
        recipe.training()


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["dump.final_states=drop", "train.draft.objective=distill"], "found drop, expected the target's distribution"),
        (["dump.final_states=drop"], ""),
        (["dump.final_states=top-k", "train.draft.objective=distill"], ""),
        (["dump.final_states=top-k", "dump.top_k=5", "train.draft.objective=top_k_kl"], "expected the 10 tokens of"),
    ],
)
def test_a_dump_that_leaves_out_what_the_objective_learns_from_is_refused_before_it_starts(
    sets: list[str], words: str
) -> None:
    recipe = load_recipe(TINY, sets)
    if not words:
        return check_recipe(recipe)
    with pytest.raises(UserError, match=rf"dump\.final_states: .*{words}"):
        check_recipe(recipe)
    return None


def test_the_global_batch_holds_all_accumulated_batches() -> None:
    section = load_recipe(TINY, ["train.global_batch_size=12", "train.gradient_accumulation_steps=3"]).training()
    assert section.batch_size == 4
    with pytest.raises(UserError, match="must be a multiple of gradient_accumulation_steps"):
        load_recipe(TINY, ["train.global_batch_size=8", "train.gradient_accumulation_steps=3"])


def test_a_resolved_recipe_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(TINY)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_operational_keys_do_not_count_as_settings() -> None:
    settings = load_recipe(TINY).synth.settings()
    assert "temperature" in settings
    assert "concurrency" not in settings


@pytest.mark.parametrize(
    ("args", "telling"),
    [
        (["--recipe", "nowhere.yaml"], "nowhere.yaml: found No such file or directory"),
        (["--recipe", str(TINY), "--set", "train.num_stepz=5"], "Did you mean 'num_steps'"),
        (["--recipe", str(TINY), "--set", "train.num_steps=["], "found broken YAML '['"),
    ],
)
def test_a_wrong_recipe_costs_one_line_and_exit_code_2(args: list[str], telling: str) -> None:
    result = run("recipe", "check", *args, check=False)
    assert result.returncode == 2
    assert telling in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_a_resolved_recipe_whose_secrets_were_removed_needs_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(load_recipe(TINY, ["serve.env.HF_TOKEN=hf_abc"]).to_yaml())
    recipe = load_recipe(path)
    with pytest.raises(UserError, match=r"env.HF_TOKEN: found <redacted>.*--set serve.env.HF_TOKEN"):
        engine_env(recipe.serve.env)
    assert engine_env(load_recipe(path, ["serve.env.HF_TOKEN=x"]).serve.env)["HF_TOKEN"] == "x"
    monkeypatch.setenv("HF_TOKEN", "hf_shell")
    assert engine_env(recipe.serve.env)["HF_TOKEN"] == "hf_shell"
    path.write_text(load_recipe(TINY, ["serve.args.api-key=k"]).to_yaml())
    with pytest.raises(UserError, match=r"\(serve.args.api-key\): found <redacted>"):
        load_recipe(path)


def test_old_keys_of_eagle3_are_named_as_eagle3_has_them_and_a_whole_old_section_is_refused(tmp_path: Path) -> None:
    old = "{method: eagle3, block_size: 4, num_anchors: 3, num_attention_heads: 2, ttt_steps: 5, num_steps: 1}"
    (tmp_path / "old.yaml").write_text(f"target: {{path: here}}\ntrain: {old}\n")
    with pytest.raises(UserError) as raised:
        load_recipe(tmp_path / "old.yaml")
    for advice in (
        "rename train.block_size to train.draft.num_speculative_tokens (block_size - 1)",
        "remove train.num_anchors, which eagle3 does not have",
        "rename train.num_attention_heads to train.draft.num_attention_heads",
        "rename train.ttt_steps to train.draft.ttt_length",
    ):
        assert advice in str(raised.value)
    with pytest.raises(UserError, match=r"rename train.method to train.draft.method"):
        load_recipe(TINY, [f"train={old}"])


@pytest.mark.parametrize("section", ["serve.speculative", "serve.variants.small.speculative"])
def test_a_schedule_of_draft_tokens_is_checked_and_no_other_key_is_a_list(section: str) -> None:
    def load(key: str, value: str) -> Recipe:
        variant = "serve.variants.small={path: x, memory_gb: 1}"
        return load_recipe(TINY, [variant, f"{section}.{key}={value}"])

    recipe = load("num_speculative_tokens_per_batch_size", "[[1, 4, 7], [5, 32, 0]]")
    assert "num_speculative_tokens_per_batch_size" in recipe.to_yaml()
    with pytest.raises(UserError, match=r"\[6, 32, 0\] in num_speculative.*; expected \[5, last batch size"):
        load("num_speculative_tokens_per_batch_size", "[[1, 4, 7], [6, 32, 0]]")
    for key, value in (("num_speculative_tokens_per_batch_size", "3"), ("method", "[1]")):
        with pytest.raises(UserError, match=f"{key}: num_speculative_tokens_per_batch_size is a list"):
            load(key, value)

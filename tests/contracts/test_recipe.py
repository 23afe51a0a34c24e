"""Claims about recipes: what is wrong is named, what is right is resolved, in the promised order of precedence."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, run

from contracts.check import check_recipe
from contracts.errors import UserError
from contracts.recipe import load_recipe

TINY = ROOT / "recipes/Tiny-DFlash/recipe.yaml"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_recipe_loads_and_passes_its_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_recipe(load_recipe(path))


def test_an_unknown_key_is_an_error_that_names_the_nearest_key() -> None:
    with pytest.raises(UserError, match=r"train\.blok_size.*'blok_size'.*Did you mean 'block_size'"):
        load_recipe(TINY, ["train.blok_size=8"])


def test_an_unknown_section_is_an_error_that_names_the_nearest_section() -> None:
    with pytest.raises(UserError, match="Did you mean 'train'"):
        load_recipe(TINY, ["trian.num_steps=8"])


def test_a_value_of_the_wrong_kind_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match=r"train\.num_steps.*'many'"):
        load_recipe(TINY, ["train.num_steps=many"])


def test_flags_win_over_set_which_wins_over_the_recipe() -> None:
    assert load_recipe(TINY).train.block_size == 8
    assert load_recipe(TINY, ["train.block_size=4"]).train.block_size == 4
    assert load_recipe(TINY, ["train.block_size=4"], {"train.block_size": 6}).train.block_size == 6
    assert load_recipe(TINY, ["train.block_size=4"], {"train.block_size": None}).train.block_size == 4


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

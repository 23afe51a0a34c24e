"""Claims about every kind of draft: its layouts are read alike, and training starts from it or from another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trained import IDS, LAYERS, SETS, Trained, logits_of_first_reply, set_key

from common.errors import UserError
from drafts import METHODS
from drafts.published import read_config, read_draft
from recipe.load import load_recipe
from target.head import read_head
from target.target import Target
from train.draft import suppose_config
from train.start import load_start, open_start, own_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), recipe_path, Target.read(target_folder))


RARE = ("dspark fill-in", "peagle reduced")
"""Kinds whose second layout differs from another kind's in nothing new."""
BOTH_LAYOUTS = ("dflash", "dspark", "dspark fill-in", "eagle3", "eagle3 reduced", "peagle", "peagle reduced")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *product(BOTH_LAYOUTS, ["native"]),
        ("dflash2", "native"),
        pytest.param("lilicorr convolution", "native", marks=pytest.mark.long),
        pytest.param("lilicorr", "native", marks=pytest.mark.rare),
        *(pytest.param(kind, "speculators", marks=pytest.mark.rare if kind in RARE else []) for kind in BOTH_LAYOUTS),
    ],
)
def test_an_export_in_each_layout_evaluates_and_starts_as_its_checkpoint(
    trained: Trained, kind: str, layout: str, tmp_path: Path
) -> None:
    store, export = trained.store(kind), trained.export(kind, layout)
    trained.eval(kind, tmp_path / "run.json", "--run", trained.run(kind).folder, "--store", store)
    printed = trained.eval(kind, tmp_path / "draft.json", "--draft", export, "--store", store).stdout
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "draft"))
    assert ours.pop("inputs") != theirs.pop("inputs")
    assert ours == theirs
    assert ours["acceptance_length"] > 1.5  # it has learned something that a wrong tensor would spoil
    assert "newly initialized                  0" in printed
    printed = trained.start(kind, export, tmp_path / "start").stdout
    length = f"{ours['acceptance_length']:.3f}"
    assert f"before the first step: predicted acceptance length {length} at K = 3 on the training samples" in printed


def test_dspark_starts_from_a_dflash_draft_of_its_layout(trained: Trained, tmp_path: Path) -> None:
    store, export = trained.store("dflash"), trained.export("dflash")
    args = ["--run", trained.run("dflash").folder, "--store", store]
    trained.eval("dflash", tmp_path / "dflash.json", *args)
    expected = json.loads((tmp_path / "dflash.json").read_text())["acceptance_length"]
    for folder in (export, trained.run("dflash").folder):
        printed = trained.start("dspark fill-in", folder, tmp_path / folder.name).stdout
        assert "newly initialized                  4  confidence_head.proj.bias, confidence_head.proj.weight" in printed
        # The Markov head begins near 0.
        assert f"predicted acceptance length {expected:.2f}" in printed
    refused = trained.start("dspark", export, tmp_path / "shifted", check=False).stderr
    assert "train.draft.sample_from_anchor: found True, expected False, as in the draft" in refused
    refused = trained.eval("dspark", tmp_path / "x.json", "--draft", export, "--store", store, check=False).stderr
    assert "train.draft.method: found dspark, expected dflash" in refused


def test_dspark_drafts_of_modelopt_are_read_and_others_are_refused_by_name(trained: Trained, tmp_path: Path) -> None:
    def modelopt(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        inner = {"mask_token_id": config.pop("mask_token_id"), "target_layer_ids": config.pop("target_layer_ids")}
        inner |= {"markov_rank": config.pop("markov_rank"), "markov_head_type": "vanilla"}
        inner |= {"shift_label": config.pop("sample_from_anchor"), "use_confidence_head": True}
        for key in ("enable_confidence_head", "confidence_head_with_markov", "is_causal"):
            config.pop(key)
        config |= {"architectures": ["DFlashDraftModel"], "dflash_config": inner}
        for name in list(tensors):
            new = name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj")
            tensors[new] = tensors.pop(name)

    expected = load_file(trained.export("dspark") / "model.safetensors")
    method, found = read_draft(trained.changed("dspark", tmp_path / "modelopt", modelopt), 6)
    assert method.name == "dspark"
    assert found.facts["sample_from_anchor"]
    assert found.facts["num_speculative_tokens"] == 3
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.items())

    for key, value, told in (
        ("markov_head_type", "gated", "found gated, expected vanilla"),
        ("draft_vocab_size", 100, "the whole vocabulary"),
        ("confidence_head_with_markov", False, "found False, expected true"),
    ):
        folder = tmp_path / key
        trained.changed("dspark", folder, lambda config, _, new={key: value}: config.update(new))  # type: ignore[misc]
        with pytest.raises(UserError, match=told):
            read_draft(folder, 6)


def test_peagle_starts_from_an_eagle3_draft_whose_first_draft_tokens_it_keeps(trained: Trained, tmp_path: Path) -> None:
    run, recipe = trained.run("eagle3 reduced").folder, load_recipe(trained.recipe_path, SETS["peagle reduced"][1::2])
    eagle3 = read_config(trained.run("eagle3 reduced"))
    expected = METHODS["eagle3"].build(eagle3)
    expected.load_state_dict(load_file(trained.run("eagle3 reduced").chosen_weights()))
    first = logits_of_first_reply(expected.eval(), trained.store("eagle3 reduced"), trained.target)[0]
    for folder in (trained.export("eagle3 reduced"), run):
        start = open_start(folder, recipe, trained.target, to_train=True)
        draft = start.method.build(own_config(start, suppose_config(recipe, trained.target)))
        told = load_start(start, draft, read_head(trained.target))
        assert "newly initialized                  1  mask_hidden" in told[-1]
        assert "midlayer.hidden_norm.weight -> layers.0.hidden_norm.weight" in told[1]
        found = logits_of_first_reply(draft.eval(), trained.store("eagle3 reduced"), trained.target)
        torch.testing.assert_close(found[0], first, rtol=1e-4, atol=1e-4)
    printed = trained.start("peagle reduced", run, tmp_path / "start").stdout
    assert "before the first step: predicted acceptance length" in printed
    refused = trained.start("peagle", run, tmp_path / "deeper", check=False).stderr
    assert "train.draft.num_layers: found 2, expected 1" in refused


def test_peagle_drafts_with_other_names_are_read_and_others_are_refused_by_name(
    trained: Trained, tmp_path: Path
) -> None:
    def renamed(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config["ptd_token_id"] = config.pop("pard_token")
        config["eagle_config"] = {IDS: [i - 1 for i in config.pop(IDS)]}
        del config["mask_token_id"]
        tensors["mask_hidden"] = tensors["mask_hidden"].flatten()
        for name in [name for name in tensors if name.startswith("layers.0.")]:
            tensors[name.replace("layers.0.", "midlayer.")] = tensors.pop(name)

    expected = load_file(trained.export("peagle") / "model.safetensors")
    method, found = read_draft(trained.changed("peagle", tmp_path / "renamed", renamed), 6)
    assert method.name == "peagle"
    assert found.layers.ids == list(LAYERS["peagle"])
    assert found.facts["mask_token_id"] == read_config(trained.run("peagle")).mask_token_id
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.items())

    changes: dict[str, tuple[Callable[..., Any], str]] = {
        "norms": (set_key("norm_before_residual", value=True), "a draft without further norms"),
        "mask": (lambda _, tensors: tensors.pop("mask_hidden"), "found none in the weights, expected the features"),
        "layers": (lambda config, _: config.pop(IDS), "expected the captured layers"),
    }
    for name, (change, told) in changes.items():
        with pytest.raises(UserError, match=told):
            read_draft(trained.changed("peagle", tmp_path / name, change), 6)

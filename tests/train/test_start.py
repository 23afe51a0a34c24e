"""Claims about starting from a draft: every layout is read to the same draft, what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_lines, run, run_here
from safetensors.torch import load_file, save_file
from written import write_store

from common.errors import UserError
from contracts.draft import DraftRun
from contracts.store import Store
from drafts import METHODS
from drafts.draft import Draft
from drafts.published import read_config, read_draft
from recipe.load import load_recipe
from target.head import read_head
from target.target import Target
from train.draft import suppose_config
from train.start import Start, load_start, open_start, own_config

SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64"
SETS = {
    "dflash": ["--set", "train.draft.num_anchors=60"],
    "eagle3": ["--set", f"train.draft={{method: eagle3, ttt_length: 3, {SIZES}}}"],
    "eagle3 reduced": ["--set", f"train.draft={{method: eagle3, ttt_length: 3, draft_vocab_size: 400, {SIZES}}}"],
}
STEPS = 160
FAST = (f"num_steps={STEPS}", "learning_rate=0.01", "global_batch_size=10", f"checkpoint_every={STEPS - 1}")
DSPARK = f"method: dspark, num_speculative_tokens: 3, num_layers: 1, num_anchors: 60, markov_rank: 16, {SIZES}"
SETS["dspark"] = ["--set", f"train.draft={{{DSPARK}}}"]
SETS["dspark fill-in"] = ["--set", f"train.draft={{{DSPARK}, sample_from_anchor: false}}"]
PEAGLE = f"method: peagle, num_speculative_tokens: 3, objective: tokens, {SIZES}"
SETS["peagle"] = ["--set", f"train.draft={{{PEAGLE}, num_layers: 2}}"]
SETS["peagle reduced"] = ["--set", f"train.draft={{{PEAGLE}, num_layers: 1, draft_vocab_size: 400}}"]
BLOCKS = f"num_layers: 1, num_anchors: 60, block_size: 4, {SIZES}"
SELECTOR = "conv_group_size: 8, selector_rank: 16, selector_top_k: 8"
LATTICE = "lilicorr_hidden_size: 32, lilicorr_num_heads: 2, lilicorr_factor_dim: 32, lilicorr_candidate_topk: 4"
SETS["dflash2"] = ["--set", f"train.draft={{method: dflash2, objective: tokens, {BLOCKS}, {SELECTOR}}}"]
SETS["lilicorr"] = ["--set", f"train.draft={{method: lilicorr, {BLOCKS}, {LATTICE}}}"]
SETS["lilicorr convolution"] = [
    "--set", f"train.draft={{method: lilicorr, {BLOCKS}, {LATTICE}, conv_kernel_size: 2, conv_group_size: 8}}"
]  # fmt: skip
SETS["eagle3 low"] = SETS["eagle3"]
NATIVE_ONLY = ("dflash2", "lilicorr", "lilicorr convolution")
LAYERS = {
    **dict.fromkeys(("dflash", "dspark", "dspark fill-in", *NATIVE_ONLY), (1, 2)),
    **dict.fromkeys(("eagle3", "eagle3 reduced", "peagle", "peagle reduced"), (1, 2, 3)),
    "eagle3 low": (0, 1, 2),
}


class Trained:
    """A store and a draft trained on it, by the name of its settings."""

    def __init__(self, folder: Path, recipe_path: Path, target: Target) -> None:
        self.folder, self.recipe_path, self.target = folder, recipe_path, target

    def args(self, kind: str) -> list[object]:
        return ["--recipe", self.recipe_path, *SETS[kind]]

    def store(self, kind: str) -> Path:
        path = self.folder / f"store-{kind}"
        return path if path.exists() else write_store(path, self.target, layer_ids=LAYERS[kind])

    def run(self, kind: str) -> DraftRun:
        run = DraftRun(self.folder / f"run-{kind}")
        if not run.config_path.exists():
            fast = [word for one in FAST for word in ("--set", f"train.{one}")]
            args = [*self.args(kind), *fast, "--store", self.store(kind), "--output", run.folder]
            run_here("train", "offline", *args)
        return run

    def export(self, kind: str, layout: str = "native") -> Path:
        path = self.folder / f"export-{kind}-{layout}"
        if not path.exists():
            args = [*self.args(kind), "--run", self.run(kind).folder, "--format", layout, "--output", path]
            run_here("train", "export", *args)
        return path

    def eval(self, kind: str, output: Path, *words: object, check: bool = True) -> Any:
        args = ["train", "eval", *self.args(kind), "--output", output, *words]
        return run_here(*args, check=check)

    def start(self, kind: str, folder: Path, output: Path, *words: object, check: bool = True) -> Any:
        """Start one step of training from a folder."""
        args = [*self.args(kind), "--set", "train.num_steps=1", "--set", f"train.init_from={folder}", *words]
        return run_here("train", "offline", *args, "--store", self.store(kind), "--output", output, check=check)

    def changed(self, kind: str, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
        """Copy the native export to `folder` with another config and other tensors."""
        shutil.copytree(self.export(kind), folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return folder


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
        *product(NATIVE_ONLY, ["native"]),
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


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_the_first_step_of_a_warm_start_is_the_one_that_training_would_go_on_with(
    trained: Trained, kind: str, tmp_path: Path
) -> None:
    store, whole = trained.store(kind), ["--set", "train.global_batch_size=10", "--set", "train.learning_rate=0.003"]
    if kind == "dflash":
        whole += ["--set", "train.draft.num_anchors=60"]  # all there are: then every step has the same blocks
    args = [*trained.args(kind), *whole, "--store", store]
    steps = ["--set", "train.num_steps=21", "--set", "train.checkpoint_every=20"]
    run_here("train", "offline", *args, *steps, "--output", tmp_path / "run")
    trained.start(kind, tmp_path / "run/step-000020", tmp_path / "warm", *whole)
    (going_on,) = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if line["step"] == 21]
    (first,) = read_lines(tmp_path / "warm/metrics.jsonl")
    assert first["loss"] == pytest.approx(going_on["loss"], abs=2e-5)
    assert first["accuracy"] == going_on["accuracy"]


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
        ("is_causal", True, "attention is full both ways"),
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


def test_a_warm_start_with_held_out_conversations_evaluates_on_them_and_resumes_from_its_checkpoint(
    trained: Trained, tmp_path: Path
) -> None:
    sets = ("num_steps=8", "held_out_fraction=0.4", "checkpoint_every=4", "evaluate_every=8")
    words = [word for one in sets for word in ("--set", f"train.{one}")]
    run = DraftRun(tmp_path / "run")
    printed = trained.start("dflash", trained.export("dflash"), run.folder, *words).stdout
    lines = [line for line in read_lines(run.metrics_path) if "held_out_acceptance" in line]
    assert [line["step"] for line in lines] == [0, 8]
    assert f"predicted acceptance length {lines[0]['held_out_acceptance']:.3f}" in printed
    assert "on the held-out part" in printed
    expected = load_file(run.step_folder(8) / "weights.safetensors")
    state = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**state, "complete": False}))
    shutil.rmtree(run.step_folder(8))  # as if it had been killed after step 4
    again = trained.start("dflash", trained.export("dflash"), run.folder, *words).stdout
    assert "going on from step 4" in again
    assert "before the first step" not in again
    found = load_file(run.step_folder(8) / "weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (run.folder / "run.json").write_text(json.dumps({**state, "complete": False}))
    other = trained.start("dflash", trained.run("dflash").step_folder(STEPS - 1), run.folder, *words, check=False)
    assert "(inputs.init_from): found" in other.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_start_as_one(trained: Trained, parallel: str, tmp_path: Path) -> None:
    sets = ("num_steps=1", "num_threads=1", f"parallel={parallel}", f"init_from={trained.export('dflash')}")
    args = [*trained.args("dflash"), *(word for one in sets for word in ("--set", f"train.{one}"))]
    args += ["--store", trained.store("dflash"), "--output"]
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "--module", "train.cli"]
    printed = [run_here("train", "offline", *args, tmp_path / "one").stdout]
    printed += [run(*torchrun, "offline", *args, tmp_path / "two").stdout]
    one, two = ([line for line in part.splitlines() if "before the first step" in line] for part in printed)
    assert one == two
    assert len(one) == 1
    losses = [read_lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def copy_of_target(tensors: dict[str, Any], target: Target, names: tuple[str, ...]) -> None:
    head = read_head(target)
    parts = {"embed_tokens.weight": head.embedding, "lm_head.weight": head.lm_head}
    tensors.update({name: parts[name].clone() for name in names})


def z_lab(config: dict[str, Any], tensors: dict[str, Any], target: Target) -> None:
    """As z-lab writes newer drafts: block_size inside dflash_config, rope at the top level only."""
    config["dflash_config"]["block_size"] = config.pop("block_size")


def speculators_dflash(config: dict[str, Any], tensors: dict[str, Any], target: Target) -> None:
    """As speculators writes it: nested dimensions, vLLM's ids, copies of the verifier's weights."""
    inner = config.pop("dflash_config")
    own = {"mask_token_id": inner["mask_token_id"], "block_size": config.pop("block_size"), "architectures": ["X"]}
    ids = [i + 1 for i in inner["target_layer_ids"]]
    nested = dict(config)
    config.clear()
    config.update({"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": ids, **own})
    config["transformer_layer_config"] = nested
    copy_of_target(tensors, target, ("embed_tokens.weight", "lm_head.weight"))
    tensors["verifier_norm.weight"] = torch.ones(4)


def specforge(config: dict[str, Any], tensors: dict[str, Any], target: Target) -> None:
    """As SpecForge writes it: nested 0-based ids; names with a prefix."""
    config["architectures"] = ["LlamaForCausalLMEagle3"]
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.pop(IDS)]}
    copy_of_target(tensors, target, ("embed_tokens.weight",))
    for name in list(tensors):
        tensors[f"model.{name}"] = tensors.pop(name)


def eagle(config: dict[str, Any], tensors: dict[str, Any], target: Target) -> None:
    """As EAGLE writes it: a plain Llama's name, no ids (the default ones), a copy of the embedding."""
    config["architectures"] = ["LlamaForCausalLM"]
    del config[IDS], config["head_dim"], config["num_target_layers"], config["rope_parameters"]
    copy_of_target(tensors, target, ("embed_tokens.weight",))
    tensors["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(16)


def modelopt(config: dict[str, Any], tensors: dict[str, Any], target: Target) -> None:
    """As ModelOpt writes it: nested 0-based ids, `layers.0.`, the target's lm_head where the draft has none."""
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.pop(IDS)]}
    if "lm_head.weight" not in tensors:
        copy_of_target(tensors, target, ("lm_head.weight",))
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)


def inferact(config: dict[str, Any], tensors: dict[str, Any], target: Target) -> None:
    """As some heads are: vLLM's ids, but nested."""
    config["eagle_config"] = {IDS: config.pop(IDS)}
    del tensors["t2d"]  # vLLM does not read it


IDS = "eagle_aux_hidden_state_layer_ids"
FOREIGN = [
    ("dflash", z_lab), ("dflash", speculators_dflash), ("eagle3", specforge), ("eagle3 reduced", specforge),
    ("eagle3", modelopt), ("eagle3 reduced", modelopt), ("eagle3 reduced", eagle), ("eagle3 reduced", inferact),
]  # fmt: skip
NO_YARN = ["--set", "train.yarn=false", "--set", "export.yarn=null"]


def logits_of_first_reply(draft: Draft, store: Path, target: Target) -> torch.Tensor:
    sample = Store(store).read_sample(Store(store).sample_ids()[0])
    return draft.taps(sample, read_head(target), 12)["draft_logits"]


@pytest.mark.parametrize(("kind", "write"), FOREIGN, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.parametrize("files", ["whole", "sharded", "torch"])
def test_a_draft_in_another_tools_layout_has_the_same_logits(
    trained: Trained, kind: str, write: Callable[..., None], files: str, tmp_path: Path
) -> None:
    if write is eagle:
        recipe = load_recipe(trained.recipe_path, [*SETS[kind][1::2], *NO_YARN[1::2]])
    else:
        recipe = load_recipe(trained.recipe_path, SETS[kind][1::2])

    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        if write is eagle:
            config["rope_scaling"] = None
        write(config, tensors, trained.target)

    folder = trained.changed(kind, tmp_path / "draft", change)
    (folder / "draftline.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    if files != "whole":
        (folder / "model.safetensors").unlink()
    if files == "torch":
        torch.save(tensors, folder / "pytorch_model.bin")
    if files == "sharded":
        names = sorted(tensors)
        parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: tensors[name] for name in held}, folder / part)
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    num_layers = 7 if write is eagle else trained.target.num_layers  # 7: the default ids are 1, 2 and 3
    start = Start(folder, *read_draft(folder, num_layers))
    assert start.draft.layers.ids == list(LAYERS[kind])
    config = own_config(start, suppose_config(recipe, trained.target))
    draft = start.method.build(config)
    load_start(start, draft, read_head(trained.target))
    expected_config = read_config(trained.run(kind))
    if write is eagle:
        expected_config = expected_config.model_copy(update={"yarn": None})
    expected = start.method.build(expected_config)
    expected.load_state_dict(load_file(trained.run(kind).chosen_weights()))
    found = logits_of_first_reply(draft.eval(), trained.store(kind), trained.target)
    assert torch.equal(found, logits_of_first_reply(expected.eval(), trained.store(kind), trained.target))
    assert found.abs().max() > 1


def set_key(*path: str, value: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def add_tensor(name: str, *shape: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, tensors: tensors.update({name: torch.ones(*shape)})


def ids_for_offsets(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("dflash", set_key("hidden_size", value=32), "from the 128 columns of fc.weight"),
        ("dflash", set_key("vocab_size", value=7), "found vocab_size 7, expected"),
        ("dflash", set_key("num_target_layers", value=9), "found num_target_layers 9, expected 5 as in"),
        ("dflash", set_key("intermediate_size", value=80), "train.draft.intermediate_size: found 64, expected 80"),
        ("dflash", set_key("num_hidden_layers", value=2), "train.draft.num_layers: found 1, expected 2"),
        ("dflash", set_key("dflash_config", "mask_token_id", value=3), "target.mask_token_id: found"),
        ("dflash", set_key("dflash_config", "target_layer_ids", value=[1, 4]), "those that a store can hold"),
        ("dflash", set_key("dflash_config", "target_layer_ids", value=[1]), "found 1 layers"),
        ("dflash", set_key("layer_types", value=["sliding_attention"]), "(layer_types): found sliding_attention"),
        ("dflash", set_key("dflash_config", "shift_label", value=True), "(shift_label): found True"),
        ("dflash", set_key("rope_parameters", value={"rope_type": "llama3"}), "(rope_parameters): found llama3"),
        ("dflash", add_tensor("markov_head.markov_w1.weight", 4, 4), "found DSpark's heads (markov_head.markov_w1"),
        ("dflash", add_tensor("embed_tokens.weight", 4, 64), "(embed_tokens.weight): found other values than the"),
        ("dflash", lambda _, tensors: tensors.pop("norm.weight"), "found no norm.weight, expected all weights"),
        ("dflash", add_tensor("norm.weight", 4), "(norm.weight): found shape (4,), expected (64,)"),
        ("eagle3", set_key("norm_before_residual", value=True), "(norm_before_residual): found True"),
        ("eagle3", add_tensor("fc_norm.0.weight", 64), "found EAGLE 3.1's norms before fc (fc_norm.0.weight)"),
        ("eagle3", add_tensor("midlayer.self_attn.q_norm.weight", 32), "found norms of queries and keys (Qwen3)"),
        ("eagle3", set_key("num_hidden_layers", value=4), "found num_layers 4, expected 1"),
        ("eagle3 reduced", set_key("draft_vocab_size", value=300), None),
        ("eagle3 reduced", ids_for_offsets, "found d2t of other tokens than t2d, expected offsets"),
        ("eagle3 reduced", lambda _, tensors: tensors["d2t"].neg_(), "found d2t that gives no ascending token ids"),
        ("dflash", lambda config, _: config.pop("num_attention_heads"), "(num_attention_heads): found none"),
        ("eagle3 reduced", lambda _, tensors: tensors.pop("d2t"), "but no d2t, expected d2t, the offsets"),
    ],
)  # fmt: skip
def test_a_draft_that_does_not_fit_is_refused_by_name(
    trained: Trained, kind: str, change: Callable[..., None], told: str | None, tmp_path: Path
) -> None:
    folder = trained.changed(kind, tmp_path / "draft", change)
    result = trained.start(kind, folder, tmp_path / "run", check=False)
    if told is None:  # d2t counts, not the key
        assert result.returncode == 0
        return
    assert result.returncode == 2
    assert told in result.stderr
    assert not DraftRun(tmp_path / "run").steps()


def test_a_draft_of_another_method_or_without_weights_or_with_code_is_refused(trained: Trained, tmp_path: Path) -> None:
    export = trained.export("eagle3")
    result = trained.start("dflash", export, tmp_path / "run", check=False)
    assert "train.draft.method: found dflash, expected eagle3" in result.stderr
    absent = trained.start("dflash", Path("org/draft"), tmp_path / "run", check=False)
    assert "org/draft: found no config.json in the hub's cache" in absent.stderr
    assert "Download it: hf download org/draft" in absent.stderr
    folder = trained.changed("dflash", tmp_path / "draft", lambda *_: None)
    (folder / "model.safetensors").unlink()
    assert "found no weights" in trained.start("dflash", folder, tmp_path / "run", check=False).stderr
    torch.save({"a": Path("x"), "b": print}, folder / "pytorch_model.bin")
    assert "found a file that cannot be read" in trained.start("dflash", folder, tmp_path / "run", check=False).stderr
    store = trained.store("dflash")
    both = trained.eval(
        "dflash", tmp_path / "e.json", "--store", store, "--run", export, "--draft", export, check=False
    )
    assert "--run and --draft: found both, expected one of them" in both.stderr


def test_a_reduced_vocabulary_is_newly_initialized_on_a_draft_without_one(trained: Trained, tmp_path: Path) -> None:
    printed = trained.start("eagle3 reduced", trained.run("eagle3").folder, tmp_path / "run").stdout
    assert "newly initialized                  3  d2t, lm_head.weight, t2d" in printed
    assert "the draft knows 400 of" in printed
    refused = trained.start("eagle3", trained.run("eagle3 reduced").folder, tmp_path / "full", check=False)
    assert "train.draft.draft_vocab_size: found none, expected 400" in refused.stderr


def test_ropes_and_targets_that_differ_are_told_and_the_drafts_own_theta_is_kept(
    trained: Trained, tmp_path: Path
) -> None:
    change = set_key("rope_parameters", value={"rope_type": "default", "rope_theta": 5000.0})
    folder = trained.changed("dflash", tmp_path / "draft", change)
    described = json.loads((folder / "draftline.json").read_text())
    (folder / "draftline.json").write_text(json.dumps({**described, "target_fingerprint": "f" * 64}))
    printed = trained.start("dflash", folder, tmp_path / "run", "--set", "train.draft.block_size=6").stdout
    assert "yarn: the draft has none, this training factor=2.0" in printed
    assert "block_size: the draft has 4, this training 6" in printed
    assert "target: the draft was trained for ffffffffffff" in printed
    assert read_config(DraftRun(tmp_path / "run")).rope_theta == 5000.0


def too_high(config: dict[str, Any], _: dict[str, Any]) -> None:
    ids, key = (config, IDS) if IDS in config else (config["dflash_config"], "target_layer_ids")
    ids[key] = [i + 1 for i in ids[key]]


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("dflash", "is 0-based: k is the output of layer k"),
        ("eagle3 low", "counts as vLLM does: k is the output of lay"),
    ],
)
def test_a_layer_offset_is_found_by_an_evaluation_before_training_and_named(
    trained: Trained, kind: str, counted: str, tmp_path: Path
) -> None:
    folder = trained.changed(kind, tmp_path / "draft", too_high)
    refused = trained.start(kind, folder, tmp_path / "run", check=False)
    assert refused.returncode == 2
    assert f"found a draft that reads layers {[i + 1 for i in LAYERS[kind]]}" in refused.stderr
    assert counted in refused.stderr
    assert f"the store's layers {list(LAYERS[kind])}. All are one too high" in refused.stderr
    words = ["--store", trained.store(kind), "--samples", 8]
    trained.eval(kind, tmp_path / "right.json", "--run", trained.run(kind).folder, *words)
    length = json.loads((tmp_path / "right.json").read_text())["acceptance_length"]
    assert f"predicts an acceptance length of {length:.3f} at K = 3" in refused.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    again = trained.eval(kind, tmp_path / "wrong.json", "--draft", folder, *words, check=False)
    assert f"predicts an acceptance length of {length:.3f} at K = 3" in again.stderr


def test_a_store_of_the_wrong_layers_shows_before_the_first_step_and_one_with_the_layers_beside_names_the_offset(
    trained: Trained, tmp_path: Path
) -> None:
    folder = trained.changed("dflash", tmp_path / "draft", too_high)
    wrong = write_store(tmp_path / "wrong", trained.target, layer_ids=(2, 3))  # as the folder says
    args = [*trained.args("dflash"), "--set", "train.num_steps=1", "--set", f"train.init_from={folder}"]
    printed = run_here("train", "offline", *args, "--store", wrong, "--output", tmp_path / "run").stdout
    assert (
        "train: that is low. The draft reads layers [2, 3] (dflash_config.target_layer_ids [2, 3] is 0-based" in printed
    )
    assert "target.aux_layers=[1, 2, 3]" in printed
    wide = write_store(tmp_path / "wide", trained.target, layer_ids=(1, 2, 3))
    printed = trained.eval("dflash", tmp_path / "wide.json", "--draft", folder, "--store", wide).stdout
    report = json.loads((tmp_path / "wide.json").read_text())
    (lower,) = report["shifted_layers"]
    assert lower["layer_ids"] == [1, 2]
    assert lower["acceptance_length"] > 1.5 > report["acceptance_length"]
    assert lower["gain"][0] > 0.3
    assert "with layers [1, 2] instead of [2, 3]" in printed
    assert "the folder's layer ids are off by one" in printed
    right = trained.eval("dflash", tmp_path / "ok.json", "--draft", trained.export("dflash"), "--store", wide).stdout
    assert "with layers [2, 3] instead of [1, 2]" in right
    assert "no better" in right
    assert "off by one" not in right

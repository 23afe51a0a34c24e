"""Claims about starting from a draft: every layout is read to the same draft, what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_lines, run, run_here
from safetensors.torch import load_file, save_file
from trained import IDS, LAYERS, SETS, STEPS, Trained, logits_of_first_reply, set_key
from written import write_store

from contracts.draft import DraftRun
from drafts.published import read_config, read_draft
from recipe.load import load_recipe
from target.head import read_head
from target.target import Target
from train.draft import suppose_config
from train.start import Start, load_start, own_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), recipe_path, Target.read(target_folder))


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


FOREIGN = [
    ("dflash", z_lab), ("dflash", speculators_dflash), ("eagle3", specforge), ("eagle3 reduced", specforge),
    ("eagle3", modelopt), ("eagle3 reduced", modelopt), ("eagle3 reduced", eagle), ("eagle3 reduced", inferact),
]  # fmt: skip
NO_YARN = ["--set", "train.yarn=false", "--set", "export.yarn=null"]


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
        ("dflash", set_key("layer_types", value=["sliding_attention"]), "(sliding_window): found none"),
        ("dflash", set_key("layer_types", value=["chunked_attention"]), "(layer_types): found chunked_attention"),
        ("dflash", set_key("add_swa_attention_sink_bias", value=True), "found True, expected false: attention has no"),
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
    assert "Download it: hf download org/draft. Or give org/draft@main." in absent.stderr
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
    changes = ("--set", "train.draft.block_size=6", "--set", "train.draft.sliding_window=32")
    printed = trained.start("dflash", folder, tmp_path / "run", *changes).stdout
    assert "sliding_window: the draft has none, this training 32" in printed
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

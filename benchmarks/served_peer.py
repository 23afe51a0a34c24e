"""Compare drafts, served or predicted: ours, and one that speculators trains on the same store for as many steps.

    python benchmarks/served_peer.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=TARGET \\
        --store STORE --conversations HELD_OUT --peer-python ENVIRONMENT/bin/python --output OUTPUT

ENVIRONMENT has speculators 0.9.0. Its trainer reads the store converted by `dump convert`, packs as many tokens into a
batch as ours has on average, and uses our learning rate, schedule, weight decay, optimizer and precision. Its loss is
`kl_div` where ours distills, else `ce`.

DFlash: it draws as many anchors. Its loss weights are its default (D-PACE), or static decay with
`--peer-weights fixed-exp-decay`, the only ones that it has for `kl_div`.

EAGLE3: it unrolls as many steps, weighs them alike and knows the tokens that our draft knows. The norms that its
default adds (EAGLE 3.1) are off. It keeps the target's lm_head rows, which ours trains; a reduced vocabulary gives ours
more trained parameters, and both numbers are printed.

Its weights have the same names as ours and are served with a copy of our export's config, without YaRN. `bench
acceptance` measures both on the same replies. With `--predict HELD_OUT_STORE` instead of `--conversations`, `train
eval` predicts both on the same samples. Exits with an error if steps, parameters or measured replies of the two differ,
and for a recipe that its trainer has no option for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from contracts.acceptance import Acceptance
from contracts.run import read_run
from contracts.store import Store
from drafts.dflash.config import DFlashSection
from drafts.eagle3.config import Eagle3Section
from recipe.load import load_recipe
from recipe.mask import mask_token_of
from recipe.recipe import Recipe
from recipe.train import TrainSection
from target.layers import captured_layers
from target.target import Target

MAX_DIFFERENCE = 0.01
"""Largest relative difference of reply tokens: drafts of other acceptance round differently at near ties."""
FROZEN = ("embed_tokens.", "lm_head.", "verifier_", "t2d", "d2t")
"""Beginnings of the names of the target's weights, which speculators does not train."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--store", type=Path, required=True)
    held_out = parser.add_mutually_exclusive_group(required=True)
    held_out.add_argument("--conversations", type=Path, help="serve both drafts; held-out, greedy")
    held_out.add_argument("--predict", type=Path, help="predict the acceptance of both; a held-out store")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--peer-weights", choices=["dpace", "fixed-exp-decay"], default="dpace", help="of DFlash")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.set)
    refuse_untrainable(recipe.training(), args.peer_weights)
    with_recipe = ["--recipe", str(args.recipe), *(word for value in args.set for word in ("--set", value))]
    out = args.output
    stage("train", "offline", *with_recipe, "--store", str(args.store), "--output", str(out / "ours"))
    stage("train", "export", *with_recipe, "--run", str(out / "ours"), "--output", str(out / "ours-export"))
    if not (out / "converted/manifest.json").exists():
        stage("dump", "convert", str(args.store), "--to", "speculators", "--output", str(out / "converted"))
    name = f"peer-{args.peer_weights}" if recipe.training().draft.method == "dflash" else "peer"
    weights = train_peer(args, recipe, out, name)
    export_peer(weights, out / "ours-export", out / f"{name}-export")

    reports = {}
    for draft in ("ours", name):
        if args.predict:
            chosen = ["--run", str(out / "ours")] if draft == "ours" else ["--draft", str(weights.parent)]
            report = out / f"{draft}-eval.json"
            stage("train", "eval", *with_recipe, "--store", str(args.predict), "--output", str(report), *chosen)
        else:
            report = out / f"{draft}-bench/acceptance.json"
            stage("bench", "acceptance", *with_recipe, "--conversations", str(args.conversations),
                  "--draft", str(out / f"{draft}-export"), "--output", str(report.parent),
                  "--draft-tokens", str(recipe.training().draft.num_draft_tokens))  # fmt: skip
        reports[draft] = json.loads(report.read_text())
    compare(reports["ours"], reports[name], name, "sample" if args.predict else "turn")


def refuse_untrainable(section: TrainSection, peer_weights: str) -> None:
    """Exit for a recipe that speculators has no option for, or that trains ours on a part of the store."""
    draft = section.draft
    is_static = draft.method != "dflash" or draft.objective == "tokens" or peer_weights == "fixed-exp-decay"
    for key, found, expected, fits in (
        ("draft.method", draft.method, "dflash or eagle3", draft.method in ("dflash", "eagle3")),
        ("lr_schedule", section.lr_schedule, "cosine or linear", section.lr_schedule != "wsd"),
        ("max_grad_norm", section.max_grad_norm, "1.0", section.max_grad_norm == 1.0),
        ("max_samples", section.max_samples, "none", section.max_samples is None),
        ("held_out_fraction", section.held_out_fraction, "0", not section.held_out_fraction),
        ("init_from", section.init_from, "none", section.init_from is None),
        ("draft.objective", "distill", "tokens, or --peer-weights fixed-exp-decay: D-PACE needs `ce`", is_static),
    ):
        if not fits:
            raise SystemExit(f"train.{key}: found {found}, expected {expected}, which the peer trains with")


def compare(ours: Mapping[str, Any], peer: Mapping[str, Any], name: str, unit: str) -> None:
    """Print both acceptance lengths and the interval of their difference. Exits: see `check_replies`."""
    check_replies(ours, peer, unit)
    for draft, report in (("ours", ours), (name, peer)):
        print(f"{draft:>24}: acceptance length {report['acceptance_length']:.3f}")
    print(f"ours / {name}: {ours['acceptance_length'] / peer['acceptance_length']:.3f}")
    if unit == "sample":
        low, high = Acceptance.gain_interval(by_sample(ours), by_sample(peer))
        print(f"ours - {name}: [{low:+.3f}, {high:+.3f}]")


def by_sample(report: Mapping[str, Any]) -> list[Acceptance]:
    """Return the acceptance of each sample of a prediction."""
    replies = ([count for reply in walk["accepted"] for count in reply] for walk in report["walks"])
    return [Acceptance.from_steps(accepted, report["num_draft_tokens"]) for accepted in replies]


def check_replies(ours: Mapping[str, Any], peer: Mapping[str, Any], unit: str = "turn") -> None:
    """Exit unless both drafts were measured on the same turns, with as many draft tokens and reply tokens.

    Predictions: on the same samples of the same store, whose replies are the same whatever a draft accepts.
    """
    for what in ("num_draft_tokens", f"{unit}s"):
        if ours[what] != peer[what]:
            raise SystemExit(f"the two were measured otherwise ({what}): ours {ours[what]}, theirs {peer[what]}")
    if [walk[unit] for walk in ours["walks"]] != [walk[unit] for walk in peer["walks"]]:
        raise SystemExit(f"the two were measured on other {unit}s, {ours[f'{unit}s']} each")
    if unit == "sample":
        if ours["inputs"]["store"] != peer["inputs"]["store"]:
            raise SystemExit("the two were predicted on other stores")
        return
    tokens, theirs = (report["steps"] + report["accepted"] for report in (ours, peer))
    if abs(tokens - theirs) > MAX_DIFFERENCE * theirs:
        raise SystemExit(
            f"the two were measured on other replies: ours {tokens} tokens, theirs {theirs}; expected the same number "
            f"within {MAX_DIFFERENCE:.0%}"
        )


def train_peer(args: argparse.Namespace, recipe: Recipe, out: Path, name: str) -> Path:
    """Train with speculators, unless its weights exist; return the weights file. Exits if it trained other steps."""
    section, folder = recipe.training(), out / name
    if section.num_steps in (found := find_checkpoints(folder)):
        return found[section.num_steps]
    folder.mkdir(parents=True, exist_ok=True)
    summary, target = read_run(args.store, "dump run")["summary"], Target.read(recipe.target.path)
    tokens = round(section.global_batch_size * summary["tokens"] / summary["samples"])
    if (longest := max(Store(args.store).lengths().values())) > tokens:  # its packing ends an epoch there
        raise SystemExit(f"train.global_batch_size: found {tokens} tokens on average, expected a sample's {longest}")
    method, flags = words_of_method(recipe, target, args.peer_weights, tokens, out)
    words = {
        "verifier-name-or-path": target.path.resolve(), "data-path": out / "converted",
        "draft-config": out / "peer-config.json", "mask-token-id": mask_token_of(recipe, target) or 0,
        "total-seq-len": tokens, "train-data-ratio": 0.999, "num-workers": 0, "on-missing": "raise",
        "hidden-states-dtype": "bfloat16" if section.bf16 else "float32", "draft-attn-impl": "sdpa",
        "loss-implementation": "eager", "loss-fn": "kl_div" if section.draft.objective == "distill" else "ce",
        "epochs": 2 + section.num_steps * section.global_batch_size // summary["samples"],
        "checkpoint-freq": 1, "save-path": folder, **words_of_optimizer(section), **method,
    }  # fmt: skip
    command = [str(args.peer_python), str(Path(__file__).with_name("speculators_cpu.py"))]
    for key, value in words.items():
        command += [f"--{key}", str(value)]
    # speculators counts layers from the embeddings, as vLLM does.
    layers = [str(layer_id + 1) for layer_id in captured_layers(recipe.target, target)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    run([*command, *flags, "--target-layer-ids", *layers], environment)
    found = find_checkpoints(folder)
    if section.num_steps not in found:
        raise SystemExit(f"{folder}: found checkpoints of steps {sorted(found)}, expected one of {section.num_steps}")
    return found[section.num_steps]


def words_of_optimizer(section: TrainSection) -> dict[str, object]:
    """Return speculators' options for our optimizer, schedule, steps and seed."""
    return {
        "optimizer": section.optimizer, "lr": section.learning_rate, "weight-decay": section.weight_decay,
        "muon-lr": section.learning_rate, "muon-weight-decay": section.weight_decay,
        "scheduler-type": section.lr_schedule, "scheduler-warmup-steps": section.warmup_steps,
        "scheduler-total-steps": section.num_steps, "max-steps": section.num_steps, "seed": section.seed,
    }  # fmt: skip


def words_of_method(
    recipe: Recipe, target: Target, peer_weights: str, tokens: int, out: Path
) -> tuple[dict[str, object], list[str]]:
    """Write the draft's config and vocabulary for speculators; return its method's options and switches.

    `tokens`: of a batch.
    """
    section = recipe.training()
    draft = section.draft
    write_draft_config(recipe, target, out / "peer-config.json")
    if isinstance(draft, DFlashSection):
        return {
            "speculator-type": "dflash", "block-size": draft.block_size,
            "max-anchors": min(draft.num_anchors * section.global_batch_size, tokens),  # it computes unused ones too
            "per-position-loss-weight": peer_weights, "dflash-decay-gamma": draft.loss_decay,
        }, []  # fmt: skip
    assert isinstance(draft, Eagle3Section)
    words = {
        "speculator-type": "eagle3", "ttt-steps": draft.ttt_length, "ttt-step-loss-decay": draft.ttt_step_loss_decay,
    }  # fmt: skip
    if draft.draft_vocab_size is not None:
        ours = load_file(out / "ours-export/model.safetensors")
        for key in ("d2t", "t2d"):
            np.save(out / f"{key}.npy", ours[key].numpy())
            words[f"{key}-path"] = out / f"{key}.npy"
    return words, ["--no-norm-before-residual", "--no-norm-before-fc", "--no-norm-output"]


def write_draft_config(recipe: Recipe, target: Target, path: Path) -> None:
    """Write the config of speculators' draft layers: the recipe's dimensions, full attention, plain rope."""
    draft, rope = recipe.training().draft, {"rope_type": "default", "rope_theta": target.rope_theta}
    assert isinstance(draft, DFlashSection | Eagle3Section)
    config = {
        "hidden_size": target.hidden_size, "vocab_size": target.vocab_size, "head_dim": draft.head_dim,
        "num_attention_heads": draft.num_attention_heads, "num_key_value_heads": draft.num_key_value_heads,
        "intermediate_size": draft.intermediate_size, "rms_norm_eps": target.norm_eps, "hidden_act": "silu",
        "max_position_embeddings": recipe.target.max_model_len, "tie_word_embeddings": False, "rope_parameters": rope,
        "model_type": "llama", "num_hidden_layers": 1,
        # Without it vLLM takes speculators' EAGLE3 for a draft that reads three layers.
        "num_aux_hidden_states": len(captured_layers(recipe.target, target)),
    }  # fmt: skip
    if isinstance(draft, DFlashSection):
        layer_types = ["full_attention"] * draft.num_layers
        config |= {"model_type": "qwen3", "num_hidden_layers": draft.num_layers, "layer_types": layer_types}
    path.write_text(json.dumps(config))


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the weights of speculators' checkpoints by their steps.

    Its loop takes another step in each epoch that is left after --max-steps, so the last checkpoint may have more.
    """
    states = folder.glob("[0-9]*/training_state.json")
    return {int(json.loads(path.read_text())["global_step"]): path.with_name("model.safetensors") for path in states}


def export_peer(weights: Path, ours: Path, output: Path) -> None:
    """Write the peer's weights with our export's config. Exits unless they have the names and shapes of ours."""
    output.mkdir(exist_ok=True)
    theirs, wanted = load_file(weights), load_file(ours / "model.safetensors")
    if "midlayer.self_attn.q_proj.weight" in wanted:  # EAGLE3
        theirs = {key.replace("layers.0.", "midlayer.", 1): value for key, value in theirs.items()}
    shapes = [{key: tuple(value.shape) for key, value in each.items()} for each in (wanted, theirs)]
    for key in sorted({*wanted, *(key for key in theirs if not key.startswith(FROZEN))}):
        if shapes[0].get(key) != shapes[1].get(key):
            raise SystemExit(
                f"the two have other parameters ({key}): ours {shapes[0].get(key)}, theirs {shapes[1].get(key)}"
            )
    if "d2t" in wanted and not wanted["d2t"].equal(theirs["d2t"]):
        raise SystemExit("the two have other vocabularies (d2t)")
    print(f"trained parameters: ours {count(wanted, ('t2d', 'd2t')):,}, theirs {count(theirs, FROZEN):,}")
    save_file({key: theirs[key].to(wanted[key].dtype) for key in wanted}, output / "model.safetensors")
    config = json.loads((ours / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None
    (output / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(ours / "draftline.json", output)


def count(weights: Mapping[str, Tensor], without: tuple[str, ...]) -> int:
    """Return the number of parameters in tensors whose names do not begin with `without`."""
    return sum(value.numel() for key, value in weights.items() if not key.startswith(without))


def stage(*words: str) -> None:
    """Run a stage of ours."""
    run([str(Path(sys.executable).with_name(words[0])), *words[1:]])


def run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command; exit if it fails."""
    if code := subprocess.run(command, check=False, env=environment).returncode:
        raise SystemExit(f"{' '.join(command[:3])} ended with exit code {code}")


if __name__ == "__main__":
    main()

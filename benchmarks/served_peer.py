"""Compare served drafts: ours, and one trained by speculators on the same store with equal steps and parameters.

    python benchmarks/served_peer.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=TARGET \\
        --store STORE --conversations HELD_OUT --peer-python ENVIRONMENT/bin/python --output OUTPUT

ENVIRONMENT has speculators 0.9.0. Its trainer reads the store converted by `dump convert`, packs as many tokens into a
batch as ours has on average, draws as many anchors, and uses our optimizer settings and schedule. Its loss weights are
its default (D-PACE), or static decay with `--peer-weights fixed-exp-decay`. Its weights have the same names as ours and
are served with a copy of our export's config, without YaRN. `bench acceptance` measures both on the same replies. Exits
with an error if steps, parameters or measured replies of the two differ.
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

from safetensors.torch import load_file, save_file

from contracts.run import read_run
from drafts.dflash.config import DFlashSection
from recipe.load import load_recipe
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.mask_token import choose_mask_token
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
    parser.add_argument("--conversations", type=Path, required=True, help="held-out, greedy")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--peer-weights", choices=["dpace", "fixed-exp-decay"], default="dpace")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.set)
    with_recipe = ["--recipe", str(args.recipe), *(word for value in args.set for word in ("--set", value))]
    out = args.output
    stage("train", "offline", *with_recipe, "--store", str(args.store), "--output", str(out / "ours"))
    stage("train", "export", *with_recipe, "--run", str(out / "ours"), "--output", str(out / "ours-export"))
    if not (out / "converted/manifest.json").exists():
        stage("dump", "convert", str(args.store), "--to", "speculators", "--output", str(out / "converted"))
    name = f"peer-{args.peer_weights}"
    weights = train_peer(args, recipe, out, name)
    export_peer(weights, out / "ours-export", out / f"{name}-export")

    reports = {}
    for draft in ("ours", name):
        folder = out / f"{draft}-bench"
        stage("bench", "acceptance", *with_recipe, "--conversations", str(args.conversations),
              "--draft", str(out / f"{draft}-export"), "--output", str(folder),
              "--draft-tokens", str(recipe.training().draft.num_draft_tokens))  # fmt: skip
        reports[draft] = json.loads((folder / "acceptance.json").read_text())
    check_replies(reports["ours"], reports[name])
    lengths = {draft: float(report["acceptance_length"]) for draft, report in reports.items()}
    for draft, length in lengths.items():
        print(f"{draft:>24}: acceptance length {length:.3f}")
    print(f"ours / {name}: {lengths['ours'] / lengths[name]:.3f}")


def check_replies(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> None:
    """Exit unless both drafts were measured on the same turns, with as many draft tokens and reply tokens."""
    for what in ("num_draft_tokens", "turns"):
        if ours[what] != peer[what]:
            raise SystemExit(f"the two were measured otherwise ({what}): ours {ours[what]}, theirs {peer[what]}")
    if [walk["turn"] for walk in ours["walks"]] != [walk["turn"] for walk in peer["walks"]]:
        raise SystemExit(f"the two were measured on other turns, {ours['turns']} each")
    tokens, theirs = (report["steps"] + report["accepted"] for report in (ours, peer))
    if abs(tokens - theirs) > MAX_DIFFERENCE * theirs:
        raise SystemExit(
            f"the two were measured on other replies: ours {tokens} tokens, theirs {theirs}; expected the same number "
            f"within {MAX_DIFFERENCE:.0%}"
        )


def train_peer(args: argparse.Namespace, recipe: Recipe, out: Path, name: str) -> Path:
    """Train with speculators, unless its weights exist; return the weights file. Exits if it trained other steps."""
    section, target = recipe.training(), Target.read(recipe.target.path)
    draft = section.draft
    if not isinstance(draft, DFlashSection):
        raise SystemExit(f"train.draft.method: found {draft.method}, expected dflash, which the peer trains")
    folder = out / name
    if section.num_steps in (found := find_checkpoints(folder)):
        return found[section.num_steps]
    summary = read_run(args.store, "dump run")["summary"]
    tokens = round(section.global_batch_size * summary["tokens"] / summary["samples"])
    config = {
        "model_type": "qwen3", "hidden_size": target.hidden_size, "vocab_size": target.vocab_size,
        "num_hidden_layers": draft.num_layers, "num_attention_heads": draft.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads, "head_dim": draft.head_dim,
        "intermediate_size": draft.intermediate_size, "rms_norm_eps": target.norm_eps,
        "max_position_embeddings": recipe.target.max_model_len, "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": target.rope_theta},
        "layer_types": ["full_attention"] * draft.num_layers,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (out / "peer-config.json").write_text(json.dumps(config))
    # speculators counts layers from the embeddings, as vLLM does.
    epochs = 1 + section.num_steps * section.global_batch_size // summary["samples"]
    mask_token = choose_mask_token(recipe.target, target)
    layers = [str(layer_id + 1) for layer_id in captured_layers(recipe.target, target)]
    words = {
        "speculator-type": "dflash", "verifier-name-or-path": target.path.resolve(), "data-path": out / "converted",
        "draft-config": out / "peer-config.json", "mask-token-id": mask_token,
        "block-size": draft.block_size, "max-anchors": draft.num_anchors * section.global_batch_size,
        "total-seq-len": tokens, "train-data-ratio": 0.999, "hidden-states-dtype": "float32", "num-workers": 0,
        "on-missing": "raise", "draft-attn-impl": "sdpa", "loss-implementation": "eager", "loss-fn": "ce",
        "per-position-loss-weight": args.peer_weights, "dflash-decay-gamma": draft.loss_decay,
        "optimizer": "adamw", "lr": section.learning_rate, "weight-decay": section.weight_decay,
        "scheduler-type": section.lr_schedule, "scheduler-warmup-steps": section.warmup_steps,
        "scheduler-total-steps": section.num_steps, "max-steps": section.num_steps,
        "epochs": epochs, "checkpoint-freq": 1, "save-path": folder, "seed": section.seed,
    }  # fmt: skip
    command = [str(args.peer_python), str(Path(__file__).with_name("speculators_cpu.py"))]
    for key, value in words.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    run([*command, "--target-layer-ids", *layers], environment)
    found = find_checkpoints(folder)
    if section.num_steps not in found:
        raise SystemExit(f"{folder}: found checkpoints of steps {sorted(found)}, expected one of {section.num_steps}")
    return found[section.num_steps]


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
    shapes = [{key: tuple(value.shape) for key, value in each.items()} for each in (wanted, theirs)]
    for key in sorted({*wanted, *(key for key in theirs if not key.startswith(FROZEN))}):
        if shapes[0].get(key) != shapes[1].get(key):
            raise SystemExit(
                f"the two have other parameters ({key}): ours {shapes[0].get(key)}, theirs {shapes[1].get(key)}"
            )
    save_file({key: theirs[key].to(wanted[key].dtype) for key in wanted}, output / "model.safetensors")
    config = json.loads((ours / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None
    (output / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(ours / "draftline.json", output)


def stage(*words: str) -> None:
    """Run a stage of ours."""
    run([str(Path(sys.executable).with_name(words[0])), *words[1:]])


def run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command; exit if it fails."""
    if code := subprocess.run(command, check=False, env=environment).returncode:
        raise SystemExit(f"{' '.join(command[:3])} ended with exit code {code}")


if __name__ == "__main__":
    main()

"""What is a draft worth that speculators trains on the same store, with as many steps and parameters? Both are served.

    python benchmarks/served_peer.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=TARGET \\
        --store STORE --conversations HELD_OUT --peer-python ENVIRONMENT/bin/python --output OUTPUT

ENVIRONMENT has speculators 0.9.0. Its trainer reads the store through `dump convert`, packs as many tokens into a batch
as ours has on average, draws as many anchors, and has our optimizer's settings and schedule. Its objective is its own
default (D-PACE), or ours with `--peer-weights fixed-exp-decay`. Its weights have our names: they are served from a copy
of our export's config, without YaRN. Both numbers are of `bench acceptance`, over the same replies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from contracts.mask_token import choose_mask_token
from contracts.recipe import Recipe, load_recipe
from contracts.run import read_run
from contracts.target import Target, captured_layers


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

    lengths = {}
    for draft in ("ours", name):
        folder = out / f"{draft}-bench"
        stage("bench", "acceptance", *with_recipe, "--conversations", str(args.conversations),
              "--draft", str(out / f"{draft}-export"), "--output", str(folder))  # fmt: skip
        report = json.loads((folder / "acceptance.json").read_text())
        lengths[draft] = float(report["acceptance_length"])
        print(f"{draft:>24}: acceptance length {lengths[draft]:.3f}")
    print(f"ours / {name}: {lengths['ours'] / lengths[name]:.3f}")


def train_peer(args: argparse.Namespace, recipe: Recipe, out: Path, name: str) -> Path:
    """Train with speculators, unless that is done; its weights file."""
    section, target = recipe.train, Target.read(recipe.target.path)
    folder = out / name
    found = sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    summary = read_run(args.store, "dump run")["summary"]
    tokens = round(section.batch_samples * summary["tokens"] / summary["samples"])
    config = {
        "model_type": "qwen3", "hidden_size": target.hidden_size, "vocab_size": target.vocab_size,
        "num_hidden_layers": section.num_layers, "num_attention_heads": section.num_attention_heads,
        "num_key_value_heads": section.num_key_value_heads, "head_dim": section.head_dim,
        "intermediate_size": section.intermediate_size, "rms_norm_eps": target.norm_eps,
        "max_position_embeddings": recipe.target.max_model_len, "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": target.rope_theta},
        "layer_types": ["full_attention"] * section.num_layers,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (out / "peer-config.json").write_text(json.dumps(config))
    # Its ids count from the embeddings on, as vLLM's do.
    epochs = 1 + section.num_steps * section.batch_samples // summary["samples"]
    mask_token = choose_mask_token(target, recipe.target.mask_token_id)
    layers = [str(layer_id + 1) for layer_id in captured_layers(recipe.target, target)]
    words = {
        "speculator-type": "dflash", "verifier-name-or-path": target.path.resolve(), "data-path": out / "converted",
        "draft-config": out / "peer-config.json", "mask-token-id": mask_token,
        "block-size": section.block_size, "max-anchors": section.num_anchors * section.batch_samples,
        "total-seq-len": tokens, "train-data-ratio": 0.999, "hidden-states-dtype": "float32", "num-workers": 0,
        "on-missing": "raise", "draft-attn-impl": "sdpa", "loss-implementation": "eager", "loss-fn": "ce",
        "per-position-loss-weight": args.peer_weights, "dflash-decay-gamma": section.loss_decay,
        "optimizer": "adamw", "lr": section.learning_rate, "weight-decay": section.weight_decay,
        "scheduler-type": section.schedule, "scheduler-warmup-steps": section.warmup_steps,
        "scheduler-total-steps": section.num_steps, "max-steps": section.num_steps,
        "epochs": epochs, "checkpoint-freq": 1, "save-path": folder, "seed": section.seed,
    }  # fmt: skip
    command = [str(args.peer_python), str(Path(__file__).with_name("speculators_cpu.py"))]
    for key, value in words.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "--target-layer-ids", *layers], check=True, env=environment)
    return sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)[-1]


def export_peer(weights: Path, ours: Path, output: Path) -> None:
    """The peer's weights beside our export's config; the names are the same."""
    output.mkdir(exist_ok=True)
    theirs, wanted = load_file(weights), load_file(ours / "model.safetensors")
    save_file({key: theirs[key].to(wanted[key].dtype) for key in wanted}, output / "model.safetensors")
    config = json.loads((ours / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None
    (output / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(ours / "draftline.json", output)


def stage(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True)


if __name__ == "__main__":
    main()

"""Compare served drafts: ours, and one trained by speculators on the same store with equal steps and parameters.

    python benchmarks/served_peer.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=TARGET \\
        --store STORE --conversations HELD_OUT --peer-python ENVIRONMENT/bin/python --output OUTPUT

ENVIRONMENT has speculators 0.9.0. Its trainer reads the store converted by `dump convert`, packs as many tokens into a
batch as ours has on average, draws as many anchors, and uses our optimizer settings and schedule. Its loss weights are
its default (D-PACE), or static decay with `--peer-weights fixed-exp-decay`. Its weights have the same names as ours and
are served with a copy of our export's config, without YaRN. `bench acceptance` measures both on the same replies.
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

from contracts.run import read_run
from drafts.dflash.config import DFlashSection
from recipe.load import load_recipe
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.mask_token import choose_mask_token
from target.target import Target


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
    """Train with speculators, unless its weights exist; return the weights file."""
    section, target = recipe.training(), Target.read(recipe.target.path)
    draft = section.draft
    assert isinstance(draft, DFlashSection)
    folder = out / name
    found = sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
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
    mask_token = choose_mask_token(target, recipe.target.mask_token_id)
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
    subprocess.run([*command, "--target-layer-ids", *layers], check=True, env=environment)
    return sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)[-1]


def export_peer(weights: Path, ours: Path, output: Path) -> None:
    """Write the peer's weights, which have the same names as ours, with our export's config."""
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

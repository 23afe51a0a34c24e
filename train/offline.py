"""Train a DFlash draft from a hidden-state store: one loop, top to bottom.

Reads:  a store; of the target only embedding, lm_head, final norm and config.
Writes: a run folder (contracts/draft.py): draft.json, metrics.jsonl, step-* checkpoints.

Batches and anchors follow from (seed, step) alone, and the schedule from the step, so a run that was killed and goes on
from its last checkpoint ends with the very weights of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from contracts.draft import DraftConfig, DraftRun
from contracts.errors import UserError
from contracts.files import read_json, write_atomic, write_json
from contracts.recipe import Recipe, TrainSection
from contracts.run import Run
from contracts.store import Manifest
from contracts.target import Target
from contracts.target_weights import read_head
from train.data import Samples, open_states
from train.dflash import DFlash, init_weights, plan_blocks
from train.loss import block_targets, slot_weights, weighted_cross_entropy
from train.mask_token import choose_mask_token

LOG_EVERY = 10


def train_offline(recipe: Recipe, store_folder: Path, output: Path) -> dict[str, Any]:
    """Train to `train.num_steps`, or go on to it; the summary (steps, parameters, last loss).

    Raises UserError for a store of another target, or one whose layers are not the recipe's.
    """
    section = recipe.train
    target = Target.read(recipe.target.path)
    store, manifest = open_states(recipe, store_folder, target)
    config = make_draft_config(recipe, target, manifest)
    run = Run.open(
        output,
        "train offline",
        settings={"train": section.settings(), "draft": config.model_dump(mode="json")},
        inputs={"target": target.fingerprint, "store": store.checksum},
        recipe_yaml=recipe.to_yaml(),
    )
    if run.complete:
        print(f"train: {output} is finished, skipped ({_describe(run.state['summary'])})")
        return dict(run.state["summary"])
    torch.set_num_threads(section.threads or os.cpu_count() or 1)
    draft_run = DraftRun(output)
    draft_run.write_config(config)

    head = read_head(target)
    samples = Samples(store, config.mask_token_id)
    model = DFlash(config)
    init_weights(model, section.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=section.learning_rate, betas=(0.9, 0.95), weight_decay=section.weight_decay, fused=True
    )
    first_step = load_checkpoint(draft_run, model, optimizer)
    weights_by_slot = slot_weights(config.block_size, section.loss_decay)
    loss_value = cut_metrics(draft_run.metrics_path, first_step)

    with (
        tqdm(total=section.num_steps, initial=first_step, desc="train", unit="step", mininterval=2) as bar,
        draft_run.metrics_path.open("a") as metrics,
    ):
        for step in range(first_step, section.num_steps):
            batch = samples.batch(step, section)
            blocks = plan_blocks(batch.lengths, batch.anchors, config.block_size)
            labels, valid = block_targets(batch.token_ids, batch.loss_mask, blocks.anchor_rows, config.block_size)

            hidden = model(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)
            weights = (valid * weights_by_slot)[valid]
            loss, predicted = weighted_cross_entropy(hidden[valid], head.lm_head, labels[valid], weights)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(section, step)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
            optimizer.step()

            if (step + 1) % LOG_EVERY == 0 or step + 1 == section.num_steps:
                loss_value = loss.item()
                right = torch.zeros_like(valid).masked_scatter(valid, predicted == labels[valid])
                line = {
                    "step": step + 1,
                    "loss": round(loss_value, 5),
                    "grad_norm": round(norm.item(), 4),
                    "learning_rate": learning_rate(section, step),
                    "accuracy": [round(x, 4) for x in (right.sum(0) / valid.sum(0).clamp(min=1)).tolist()],
                    "blocks_accepted": round(right.long().cumprod(1).sum(1).float().mean().item(), 4),
                }
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                bar.set_postfix_str(f"loss {loss_value:.3f}, accepted {line['blocks_accepted']:.2f}", refresh=False)
            if (step + 1) % section.checkpoint_every == 0 or step + 1 == section.num_steps:
                save_checkpoint(draft_run, step + 1, model, optimizer, recipe, config, section.keep_checkpoints)
            bar.update()
            run.tick()
    summary = {
        "steps": section.num_steps,
        "parameters": sum(p.numel() for p in parameters),
        "samples": len(samples.ids),
        "loss": round(loss_value, 5),
    }
    run.finish(summary)
    print(f"train: {_describe(summary)} in {run.seconds:.0f} s -> {output}")
    return summary


def make_draft_config(recipe: Recipe, target: Target, manifest: Manifest) -> DraftConfig:
    """The draft's config: the recipe's dimensions, and from target and store what must match them.

    Raises UserError when the store holds other layers than the recipe names.
    """
    section = recipe.train
    if recipe.target.aux_layers is not None and recipe.target.aux_layers != manifest.layer_ids:
        raise UserError(
            manifest.target,
            found=f"a store of layers {manifest.layer_ids}",
            expected=f"layers {recipe.target.aux_layers} as in the recipe",
            fix="Correct target.aux_layers, or dump again.",
        )
    yarn = recipe.export.yarn if section.yarn else None
    return DraftConfig(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_layers,
        layer_ids=manifest.layer_ids,
        block_size=section.block_size,
        mask_token_id=choose_mask_token(target, recipe.target.mask_token_id),
        num_layers=section.num_layers,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        intermediate_size=section.intermediate_size,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        max_position_embeddings=recipe.target.max_model_len,
        yarn=yarn,
        target_fingerprint=target.fingerprint,
        store=manifest.conversations,
    )


def learning_rate(section: TrainSection, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, section.num_steps - section.warmup_steps)
    return section.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def save_checkpoint(
    run: DraftRun,
    step: int,
    model: DFlash,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    config: DraftConfig,
    keep: int,
) -> None:
    """Write step-XXXXXX whole or not at all, then drop all but the last `keep`."""
    folder = run.step_folder(step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary / "weights.safetensors"
    )
    torch.save({"optimizer": optimizer.state_dict()}, temporary / "state.pt")
    position = {"step": step, "seed": recipe.train.seed, "target": config.target_fingerprint, "store": config.store}
    write_json(temporary / "position.json", position)
    (temporary / "recipe.yaml").write_text(recipe.to_yaml())
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in run.steps()[:-keep]:
        shutil.rmtree(run.step_folder(old))


def load_checkpoint(run: DraftRun, model: DFlash, optimizer: torch.optim.Optimizer) -> int:
    """Load the last whole checkpoint, if any, and return the step to go on from."""
    steps = run.steps()
    if not steps:
        return 0
    folder = run.step_folder(steps[-1])
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    state = torch.load(folder / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    print(f"train: going on from step {steps[-1]}")
    return int(read_json(folder / "position.json", "a checkpoint's position")["step"])


def cut_metrics(path: Path, first_step: int) -> float:
    """Drop lines of steps that will be done again, and a torn last line; the last loss that is left (nan: none)."""
    if not path.exists():
        return math.nan
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= first_step]
    write_atomic(path, "".join(kept))
    return float(json.loads(kept[-1])["loss"]) if kept else math.nan


def _describe(summary: dict[str, Any]) -> str:
    return (
        f"{summary['steps']} steps on {summary['samples']} samples, {summary['parameters'] / 1e6:.2f}M parameters, "
        f"loss {summary['loss']}"
    )

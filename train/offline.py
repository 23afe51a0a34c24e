"""Train a draft from a hidden-state store: one loop, top to bottom.

Reads:  a store; of the target only embedding, lm_head, final norm and config.
Writes: a run folder (contracts/draft.py): draft.json, metrics.jsonl, curves.png, tensorboard/, step-* checkpoints,
        best.json where a part of the conversations is held out.

Batches and anchors follow from (seed, step) alone, and the schedule from the step, so a run that was killed and goes on
from its last checkpoint ends with the very weights of one that was not. Under torchrun several processes share each
batch; the loss is a mean over all supervised slots of a step, whoever has them.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from contracts.acceptance import Acceptance
from contracts.draft import DraftConfig, DraftRun
from contracts.errors import IncompleteError, UserError
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.target import Target
from contracts.target_weights import TargetHead, read_head
from train.checkpoint import load_checkpoint, save_checkpoint
from train.data import AnyStore, Samples, open_states, read_ahead
from train.dflash import init_weights
from train.drafts import Draft, layers_of, make_draft, make_draft_config
from train.eagle3 import Eagle3
from train.evaluate import walk
from train.log import LOG_EVERY, Log, cut_metrics
from train.processes import Processes, start_processes
from train.schedule import learning_rate
from train.vocabulary import choose_vocabulary


def train_offline(recipe: Recipe, store_folder: Path, output: Path) -> dict[str, Any]:
    """Train to `train.num_steps`, or go on to it; the summary (steps, parameters, last loss).

    Raises UserError for a store of another target, or one whose layers are not the recipe's; IncompleteError when
    SIGTERM stopped it, after a checkpoint.
    """
    target = Target.read(recipe.target.path)
    store, manifest = open_states(recipe, store_folder, target)
    config = make_draft_config(recipe, target, manifest)
    with start_processes() as processes:
        run = None
        if processes.is_first:
            run = Run.open(
                output,
                "train offline",
                settings={"train": recipe.train.settings(), "draft": config.model_dump(mode="json")},
                inputs={"target": target.fingerprint, "store": store.checksum},
                recipe_yaml=recipe.to_yaml(),
            )
        if processes.sum(torch.tensor(int(run is not None and run.complete))):
            if run is None:
                return {}
            print(f"train: {output} is finished, skipped ({_describe(run.state['summary'])})")
            return dict(run.state["summary"])
        summary = _train(recipe, config, target, store, output, processes, run)
        if run is not None:
            run.finish(summary)
            print(f"train: {_describe(summary)} in {run.seconds:.0f} s -> {output}")
        return summary


def _train(
    recipe: Recipe,
    config: DraftConfig,
    target: Target,
    store: AnyStore,
    output: Path,
    processes: Processes,
    run: Run | None,
) -> dict[str, Any]:
    section, device = recipe.train, processes.device
    torch.set_num_threads(section.threads or max(1, (os.cpu_count() or 1) // processes.world))
    # Probabilities near 0 would slow the products down a hundredfold. numpy looks at its types' limits once, and would
    # warn of what it saw then.
    np.finfo(np.float32), np.finfo(np.float64)
    torch.set_flush_denormal(True)
    torch.manual_seed(section.seed)
    draft_run = DraftRun(output)
    if processes.is_first:
        draft_run.write_config(config)
    head = read_head(target).to(device)
    samples = Samples(store, section, config.max_position_embeddings, config.mask_token_id)
    if section.batch_samples < processes.world:
        raise UserError(
            "train.batch_samples",
            found=str(section.batch_samples),
            expected=f"one for each of the {processes.world} processes",
            fix="Raise it, or start fewer processes.",
        )
    draft = make_draft(config, section).to(device)
    init_weights(draft, section.seed)
    if isinstance(draft, Eagle3) and draft.lm_head is not None:
        vocabulary = choose_vocabulary(samples, config.vocab_size, draft.lm_head.out_features)
        draft.set_vocabulary(vocabulary.kept.to(device), head)
        if processes.is_first:
            print(
                f"train: the draft knows {len(vocabulary.kept)} of {config.vocab_size} tokens, "
                f"{vocabulary.coverage:.2%} of the supervised ones"
            )
    num_parameters = sum(p.numel() for p in draft.parameters())
    if section.compile:
        for layer in layers_of(draft):
            layer.compile()
    model = processes.wrap(draft, section)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=section.learning_rate, betas=(0.9, 0.95), weight_decay=section.weight_decay, fused=True
    )
    first_step = load_checkpoint(draft_run, processes, model, optimizer)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    loss_value = cut_metrics(draft_run.metrics_path, first_step) if processes.is_first else math.nan
    best_length, improved = draft_run.best_length(), False
    log = Log(draft_run, section, processes, first_step)
    batches = read_ahead(
        samples,
        first_step * section.accumulate,
        section.num_steps * section.accumulate,
        processes.rank,
        processes.world,
    )

    with log, stop_at_sigterm() as stopped:
        for step in range(first_step, section.num_steps):
            log.start("data")
            micro = [next(batches).to(device) for _ in range(section.accumulate)]
            plans = [draft.plan(batch) for batch in micro]
            num_slots = float(processes.sum(torch.tensor(float(sum(plan.num_slots for plan in plans)))))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(section, step)
            optimizer.zero_grad()
            found = torch.zeros(0)
            for batch, plan in zip(micro, plans, strict=True):
                log.start("forward")
                with autocast:
                    result = model(batch, plan, head)
                log.start("backward")
                # Gradients are averaged over processes, the loss is one mean over all slots.
                (result.loss_sum * (processes.world / num_slots)).backward()
                found = result.counts() if not len(found) else found + result.counts()
            log.start("optimizer")
            norm = nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
            optimizer.step()

            log.start("rest")
            log.count(micro)
            last = step + 1 == section.num_steps
            if (step + 1) % LOG_EVERY == 0 or last:
                loss_value = log.write(step, processes.sum(found), num_slots, float(norm))
            if section.evaluate_every and samples.held_out and ((step + 1) % section.evaluate_every == 0 or last):
                length = held_out_length(model, draft, head, samples)
                log.note_acceptance(step, length)
                improved, best_length = length > best_length, max(length, best_length)
            stop = bool(processes.sum(torch.tensor(int(stopped["signal"]))))
            if (step + 1) % section.checkpoint_every == 0 or last or stop or improved:
                best = best_length if improved else None
                save_checkpoint(draft_run, step + 1, processes, model, optimizer, recipe, config, best)
                improved = False
                log.draw(at_once=last or stop)
            if stop and not last:
                raise IncompleteError(f"{output}: stopped by SIGTERM after step {step + 1}, which is saved. Run again.")
            if run is not None:
                run.tick()
    return {
        "steps": section.num_steps,
        "parameters": num_parameters,
        "samples": len(samples.ids),
        "held_out": len(samples.held_out),
        "truncated": len(samples.truncated),
        "cut_away": len(samples.cut_away),
        "loss": round(loss_value, 5),
        **({"best": best_length} if best_length else {}),
    }


def held_out_length(model: nn.Module, draft: Draft, head: TargetHead, samples: Samples) -> float:
    """Predicted acceptance length on the held-out conversations; every process walks all of them."""
    sharded = model if isinstance(model, FSDPModule) else None
    if sharded is not None:
        sharded.unshard()  # drafting does not go through the wrapped forward, which would do it
    draft.eval()
    parts = []
    for sample_id in samples.held_out:
        sample = samples.read(sample_id)
        replies = walk(sample, draft.draft(sample, head))
        parts.append(Acceptance.from_steps([a for reply in replies for a in reply], draft.config.block_size - 1))
    draft.train()
    if sharded is not None:
        sharded.reshard()
    return Acceptance.pool(parts).acceptance_length


@contextmanager
def stop_at_sigterm() -> Iterator[dict[str, bool]]:
    """Note SIGTERM instead of dying of it: SLURM's warning before the time limit."""
    state = {"signal": False}
    before = signal.signal(signal.SIGTERM, lambda *_: state.update(signal=True))
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(summary: dict[str, Any]) -> str:
    return (
        f"{summary['steps']} steps on {summary['samples']} samples, {summary['parameters'] / 1e6:.2f}M parameters, "
        f"loss {summary['loss']}"
        + (f", {summary['truncated']} samples cut" if summary.get("truncated") else "")
        + (f", {summary['cut_away']} left out as nothing was left of them" if summary.get("cut_away") else "")
        + (f", best predicted acceptance length {summary['best']:.3f}" if "best" in summary else "")
    )

"""Train a draft from a hidden-state store.

Reads:  a store; the target's embedding, lm_head, final norm and config.
Writes: a run folder (contracts/draft.py): draft.json, metrics.jsonl, curves.png, tensorboard/, step-* checkpoints,
        trackers.json (common/trackers/identity.py), and best.json if a part of the conversations is held out.

Batches and anchors depend on (seed, step) alone, and the learning rate on the step: a run that is killed and resumed
from its last checkpoint ends with the same weights, bit for bit, as one that is not. Under torchrun, several processes
share each batch; the loss is the mean over all supervised slots of a step on all processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from common.cores import count_cores
from common.errors import IncompleteError
from common.trackers import installed_trackers
from common.trackers.tracking import Tracking
from contracts.acceptance import Acceptance
from contracts.draft import DraftConfig, DraftRun
from contracts.run import Run, is_complete
from contracts.store import Manifest
from drafts import METHODS
from drafts.draft import Draft
from recipe.mask import note_mask_token
from recipe.recipe import Recipe
from recipe.tracking import tracked_run
from recipe.train import TrainSection
from target.head import TargetHead, read_head
from target.target import Target
from train.checkpoint import Checkpoints, load_checkpoint
from train.data import Following, Planned, Samples, open_states, read_ahead, refuse_mask_token
from train.draft import make_config
from train.evaluate import FEW, acceptance_of, refuse_layers
from train.footprint import measure_step
from train.log import LOG_EVERY, Log, cut_metrics, last_loss, scalars_of
from train.optimizer import make_optimizers
from train.plan import Machine, refuse_unfit, work_of
from train.processes import Processes, start_processes
from train.schedule import learning_rate
from train.start import Start, list_changes, load_start, open_start, start_config
from train.trained_on import FOLDER_KEY

LOW = 0.2
"""Share of accepted first draft tokens below which a draft that was trained elsewhere is suspect."""


def train_offline(
    recipe: Recipe, store_folder: Path, output: Path, *, force: bool = False, follow: Following | None = None
) -> dict[str, Any] | None:
    """Train to `train.num_steps`, or resume; return the summary (steps, parameters, last loss).

    With `follow`, from a rolling store while it is captured; until_empty may return None before the last step. Raises
    UserError for a store of another target or with other layers than the recipe's, or, without `force`, for a
    step that does not fit into memory; IncompleteError if SIGTERM stopped the run, after a checkpoint.
    """
    section = recipe.training()
    installed_trackers(recipe.tracking.train)  # before anything is read
    target = Target.here(recipe.target)
    store, manifest = open_states(recipe, store_folder, target, follow)
    config, start = make_config(recipe, target, manifest), None
    if section.init_from is not None:
        start = open_start(section.init_from, recipe, target, to_train=True)
        config = start_config(start, config, section)
    with start_processes(section.bf16) as processes:
        section.check_processes(processes.world)
        on_gpu = processes.device.type == "cuda"
        samples = Samples(store, section, config.max_position_embeddings, on_gpu=on_gpu)
        if not (force or is_complete(output)):  # before the folder belongs to a recipe that cannot run
            _refuse_unfit(recipe, target, config, samples, processes, manifest.top_k)
        run = None
        if processes.is_first:
            run = Run.open(
                output,
                "train offline",
                settings=_settings(section, config, target),
                inputs={
                    "target": target.fingerprint,
                    "store": store.checksum,
                    **(start.inputs("init_from") if start else {}),
                },
                recipe_yaml=recipe.to_yaml(),
            )
        if processes.sum(torch.tensor(int(run is not None and run.complete))):
            if run is None:
                return {}
            print(f"train: {output} is finished, skipped ({_describe(run.state['summary'])})")
            return dict(run.state["summary"])
        if run is not None:
            run.state[FOLDER_KEY] = str(store_folder.absolute())  # no input: a store may be moved before a resume
        if processes.is_first and (note := note_mask_token(recipe, target)):
            print(f"train: {note}")
        refuse_mask_token(samples, config.mask_token_id, processes)
        head = read_head(target)
        if start is not None:
            _check_layers(start, config, manifest, samples, head)
        training = _prepare(Job(recipe, config, samples, DraftRun(output), start), head, processes)
        summary = _train(training, run, follow or Following())
        if run is not None and summary is not None:
            run.finish(summary)
            print(f"train: {_describe(summary)} in {run.seconds:.0f} s -> {output}")
        return summary


def _refuse_unfit(
    recipe: Recipe, target: Target, config: DraftConfig, samples: Samples, processes: Processes, top_k: int | None
) -> None:
    """Raise UserError if this process's largest batch does not fit into memory."""
    section = recipe.training()
    masks = samples.largest_masks(processes.rank, processes.world)
    work = work_of(section, config, target, masks, processes.device.type == "cuda", top_k)
    parallel = section.parallel if processes.world > 1 else "single"
    refuse_unfit("train offline", Machine.here(processes.device), work, measure_step, (parallel, processes.world))


def _settings(section: TrainSection, config: DraftConfig, target: Target) -> dict[str, Any]:
    """Return the settings that change the weights; with `distill`, the final norm is one of them."""
    norm = {"final_norm": target.final_norm} if section.draft.needs_final_states else {}
    return {"train": section.settings(), "draft": config.model_dump(mode="json"), **norm}


def _check_layers(start: Start, config: DraftConfig, manifest: Manifest, samples: Samples, head: TargetHead) -> None:
    """Raise UserError if the draft to start from reads other layers than the store has."""

    def predict() -> Acceptance:
        draft = start.method.build(config)
        load_start(start, draft, head)
        looked_at = (samples.held_out or samples.ids)[:FEW]
        return acceptance_of(draft.eval(), head, samples.read_looks(looked_at))

    refuse_layers(start, manifest.layer_ids, predict, exact=True)


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to write it. `start`: the draft to start from."""

    recipe: Recipe
    config: DraftConfig
    samples: Samples
    run: DraftRun
    start: Start | None


@dataclass
class Training:
    """The state of the training loop. `model` is `draft`, wrapped for several processes.

    `at_start`: the predicted acceptance before the first step, if the draft is not a new one.
    """

    recipe: Recipe
    section: TrainSection
    config: DraftConfig
    run: DraftRun
    processes: Processes
    samples: Samples
    head: TargetHead
    draft: Draft
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    at_start: Acceptance | None = None


def _prepare(job: Job, head: TargetHead, processes: Processes) -> Training:
    """Build draft and optimizer, the same on every process."""
    recipe, config, samples, run = job.recipe, job.config, job.samples, job.run
    section = recipe.training()
    torch.set_num_threads(section.num_threads or max(1, count_cores() // processes.world))
    # Products with denormal probabilities are 100 times slower. Cache numpy's finfo before enabling
    # flush-to-zero; it warns otherwise.
    np.finfo(np.float32), np.finfo(np.float64)
    torch.set_flush_denormal(True)
    torch.manual_seed(section.seed)
    if processes.is_first:
        run.write_config(config)
    draft = METHODS[config.method].build(config, section.draft, gradient_checkpointing=section.gradient_checkpointing)
    lines = _initialize(job, draft, head)
    if processes.is_first:
        print("".join(f"train: {line}\n" for line in lines), end="")
    head = head.to(processes.device, processes.dtype)
    draft.to(processes.device)
    if section.compile or (section.compile is None and processes.device.type == "cuda"):
        draft.compile_layers()
    # Before FSDP2 wraps the draft: a wrapped layer may not be called before the whole model.
    at_start = None if job.start is None or run.steps() else _evaluate_start(job, job.start, draft, head, processes)
    model = processes.wrap(draft, section)
    optimizers = make_optimizers(model, section, draft.outer_modules())
    return Training(recipe, section, config, run, processes, samples, head, draft, model, optimizers, at_start)


def _initialize(job: Job, draft: Draft, head: TargetHead) -> list[str]:
    """Set the first weights; return lines that say where they are from. A checkpoint of this run replaces them."""
    start, config = job.start, job.config
    taken: list[str] = []
    if start is None or not set(draft.state_dict()) <= set(start.draft.weights):
        message = draft.initialize(
            job.recipe.training().seed, head, lambda: job.samples.count_supervised(config.vocab_size)
        )
        taken = [message] if message else []
    if start is None or job.run.steps():
        return taken
    return [f"starts from {start.folder}", *load_start(start, draft, head), *list_changes(start, config), *taken]


def _train(training: Training, run: Run | None, following: Following) -> dict[str, Any] | None:
    """Run the loop from the last checkpoint to the last step; return the summary, or None if samples are missing."""
    section, processes, follower = training.section, training.processes, training.samples.follower
    num_parameters = sum(p.numel() for p in training.draft.parameters())
    first_step = load_checkpoint(training.run, processes, training.model, training.optimizers)
    earlier = cut_metrics(training.run.metrics_path, first_step) if processes.is_first else []
    loss = last_loss(earlier)
    best_length = training.run.best_length()
    batches = read_ahead(training.samples, first_step, processes, training.draft.plan)
    tracking = _track(training.recipe, run, first_step, earlier) if run is not None else None
    log = Log(training.run, section, processes, first_step, tracking)
    if follower is None:
        checkpoints = Checkpoints(training)
    else:
        follower.start(first_step, processes)
        checkpoints = Checkpoints(training, follower.note_saved)
    with log, closing(training.samples), stop_at_sigterm() as stopped:
        if training.at_start is not None and training.samples.held_out:
            log.note_start(training.at_start.acceptance_length)
        for step in range(first_step, section.num_steps):
            if follower is not None:
                log.start("data")
                found = follower.wait_for_step(step, processes, stopped, until_empty=following.until_empty)
                if found != "ready":
                    _pause(training, checkpoints, step, found)
                    return None
            counts, normalizer, norm = _step(training, batches, step, log)
            log.start("rest")
            log.count()
            last, improved = step + 1 == section.num_steps, False
            if (step + 1) % LOG_EVERY == 0 or last:
                loss = log.write(step, processes.sum(counts), normalizer, norm)
            if _is_due(section, step, last) and training.samples.held_out:
                # Ranks may round differently, so all use the first one's length.
                length = processes.from_first(held_out_length(training))
                log.note_acceptance(step, length)
                improved, best_length = length > best_length, max(length, best_length)
            stop = bool(processes.sum(torch.tensor(int(stopped["signal"]))))
            moves = follower is not None and follower.must_save(step + 1, checkpoints.last_step)
            if (step + 1) % section.checkpoint_every == 0 or last or stop or improved or moves:
                checkpoints.save(step + 1, best_length if improved else None)
                log.draw(at_once=last or stop)
            if stop and not last:
                _pause(training, checkpoints, step + 1, "stop")
            if run is not None:
                run.tick()
        checkpoints.finish()
    return _summarize(training, num_parameters, loss, best_length)


def _track(recipe: Recipe, run: Run, first_step: int, earlier: Sequence[dict[str, Any]]) -> Tracking | None:
    """Return the run's trackers. They get the lines of earlier processes, and leave out those that they have."""
    if not recipe.tracking.train:
        return None
    tracked = tracked_run(recipe, run, first_step)
    names = installed_trackers(recipe.tracking.train)
    if len(names) < len(recipe.tracking.train):
        print("train: tensorboard is not installed; metrics.jsonl has all figures")
    tracking = Tracking(tracked, names)
    for line in earlier:
        tracking.log(scalars_of(line), line["step"])
    return tracking


def _pause(training: Training, checkpoints: Checkpoints, step: int, why: Literal["stop", "empty"]) -> None:
    """Save a checkpoint after `step` steps. Raises IncompleteError if the run was told to stop."""
    if step > checkpoints.last_step:
        checkpoints.save(step)
    checkpoints.finish()
    if why == "stop":
        raise IncompleteError(
            f"{training.run.folder}: stopped by SIGTERM after step {step}, which is saved. Run again."
        )
    if training.processes.is_first:
        print(f"train: saved after step {step}; the samples of the next step are not there yet")


def _step(
    training: Training, batches: Iterator[Planned], step: int, log: Log
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Run one optimizer step over the next accumulated batches; nothing in it waits for the device.

    Returns StepLoss counts, the normalizer of the loss over all processes, gradient norm.
    """
    section, processes, optimizers = training.section, training.processes, training.optimizers
    num_batches = section.gradient_accumulation_steps
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(section, step)
        optimizer.zero_grad()
    counts, normalizer = None, 0.0
    for number in range(num_batches):
        log.start("data")
        planned = next(batches)
        log.start("forward")
        if number == 0:
            normalizer = float(processes.sum(torch.tensor(float(planned.normalizer), dtype=torch.float64)))
        with processes.autocast(), processes.accumulate(training.model, is_last=number + 1 == num_batches):
            result = training.model(planned.batch, planned.plan, training.head)
            log.start("backward")
            # Gradients are averaged over processes, the loss is one mean over the slots of all.
            (result.loss_sum * (processes.world / normalizer)).backward()
        counts = result.counts() if counts is None else counts + result.counts()
        log.count_tokens(len(planned.batch.token_ids))
        del planned, result  # before the next copy begins: a GPU then holds two batches, not three
    log.start("optimizer")
    norm = processes.whole(nn.utils.clip_grad_norm_(training.model.parameters(), section.max_grad_norm))
    for optimizer in optimizers:
        optimizer.step()
    assert counts is not None
    return counts, normalizer, norm


def _is_due(section: TrainSection, step: int, last: bool) -> bool:
    """Return whether the held-out part is evaluated after this step."""
    return bool(section.evaluate_every) and ((step + 1) % section.evaluate_every == 0 or last)


def _evaluate_start(job: Job, start: Start, draft: Draft, head: TargetHead, processes: Processes) -> Acceptance:
    """Predict the acceptance before the first step, on held-out conversations if there are any, and print it."""
    samples = job.samples
    found = predicted_acceptance(draft, head, samples, samples.held_out or samples.ids, processes)
    if not processes.is_first:
        return found
    positions = " ".join(f"{share:.3f}" for share in found.per_position)
    part = "the held-out part" if samples.held_out else "the training samples"
    print(
        f"train: before the first step: predicted acceptance length {found.acceptance_length:.3f} at K = "
        f"{len(found.per_position)} on {part}; by position {positions}"
    )
    if found.per_position[0] < LOW:
        layers, config = start.draft.layers, start.folder / "config.json"
        wider = _with_neighbors(layers.ids, job.config)
        print(
            f"train: that is low. The draft reads layers {layers.ids} ({layers.counted}); with ids off by one, "
            f"a target accepts few draft tokens. To find out, dump a few samples with target.aux_layers={wider}, run "
            f"`train eval --draft {start.folder}` on them, and correct {config}."
        )
    return found


def _with_neighbors(layer_ids: list[int], config: DraftConfig) -> list[int]:
    """Return the layers, those below and those above, as far as a store can hold them."""
    near = {i + shift for i in layer_ids for shift in (-1, 0, 1)}
    return sorted(near & set(range(config.num_target_layers - 1)))


def held_out_length(training: Training) -> float:
    """Return the predicted acceptance length on the held-out conversations; processes share them out."""
    samples, processes = training.samples, training.processes
    sharded = training.model if isinstance(training.model, FSDPModule) else None
    if sharded is not None:
        sharded.unshard()  # only the wrapped forward does it by itself, and drafting does not call that
    found = predicted_acceptance(training.draft, training.head, samples, samples.held_out, processes)
    if sharded is not None:
        sharded.reshard()
    return found.acceptance_length


def predicted_acceptance(
    draft: Draft, head: TargetHead, samples: Samples, sample_ids: list[str], processes: Processes
) -> Acceptance:
    """Return the predicted acceptance on the first of some samples; processes share them out."""
    draft.eval()
    own = sample_ids[: samples.section.evaluate_samples][processes.rank :: processes.world]
    with processes.autocast():
        found = acceptance_of(draft, head, samples.read_looks(own))
    draft.train()
    return Acceptance(tuple(processes.sum(torch.tensor(found.histogram)).tolist()))


@contextmanager
def stop_at_sigterm() -> Iterator[dict[str, bool]]:
    """Record SIGTERM in the yielded dict instead of exiting; SLURM sends it before the time limit."""
    state = {"signal": False}
    before = signal.signal(signal.SIGTERM, lambda *_: state.update(signal=True))
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, before)


def _summarize(training: Training, num_parameters: int, loss: float, best_length: float) -> dict[str, Any]:
    samples = training.samples
    return {
        "steps": training.section.num_steps,
        "parameters": num_parameters,
        "samples": len(samples.ids),
        "held_out": len(samples.held_out),
        "truncated": len(samples.truncated),
        "cut_away": len(samples.cut_away),
        "loss": round(loss, 5),
        **({"best": best_length} if best_length else {}),
    }


def _describe(summary: dict[str, Any]) -> str:
    return (
        f"{summary['steps']} steps on {summary['samples']} samples, {summary['parameters'] / 1e6:.2f}M parameters, "
        f"loss {summary['loss']}"
        + (f", {summary['truncated']} samples truncated" if summary.get("truncated") else "")
        + (f", {summary['cut_away']} left out: nothing to draft within the length" if summary.get("cut_away") else "")
        + (f", best predicted acceptance length {summary['best']:.3f}" if "best" in summary else "")
    )

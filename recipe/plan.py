"""Plan a whole pipeline on given nodes: hours, disk, GPU memory and money of each stage.

Reads: the recipe, the target's config or the recipe's facts, and the JSON of `train plan`. No weights, store or GPU.

Stages run one after another, each on as many of the nodes as it can use; a node costs money while its stage runs. Disks
are paid from the first stage to the last. A rolling store is captured while the draft trains, on the nodes that do not
train; if there is none, both share all nodes and take the sum of their hours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from common.errors import UserError
from recipe.figures import Figure, least_certain, total
from recipe.rates import Fleet, Measured
from recipe.recipe import Recipe
from recipe.sizes import stored_bytes
from target.target import Target

TEXT_BYTES_PER_TOKEN = 13
"""Of a record with text and token ids: 11.3 and 13.4 in the tiny recipe and the one of SmolLM2-135M."""
BYTES_PER_PARAMETER = 16
"""Of a checkpoint: fp32 weights for readers, and again with AdamW's two moments for a resume."""
HOURS_PER_MONTH = 730
MFU = 0.4
"""Assumed where none is stated or measured."""


@dataclass(frozen=True)
class Case:
    """What is planned. `train`: JSON of `train plan` for `training_gpus`; `window_gb`: that of a rolling store."""

    recipe: Recipe
    target: Target
    fleet: Fleet
    measured: Measured
    train: Mapping[str, Any]
    window_gb: float | None = None

    @property
    def epoch(self) -> int:
        """Conversations that the steps of the recipe read once."""
        section = self.recipe.training()
        return section.num_steps * section.global_batch_size

    @property
    def conversations(self) -> int:
        return self.recipe.plan.conversations or self.epoch

    @property
    def tokens(self) -> int:
        return self.conversations * self.recipe.plan.mean_tokens

    def with_share(self, share: float) -> Case:
        """Return the case with a share of the conversations, and as many epochs."""
        section = self.recipe.training()
        steps = max(1, round(section.num_steps * share))
        plan = self.recipe.plan.model_copy(update={"conversations": max(1, round(self.conversations * share))})
        training = section.model_copy(update={"num_steps": steps})
        return replace(self, recipe=self.recipe.model_copy(update={"plan": plan, "train": training}))


@dataclass(frozen=True)
class Stage:
    """A stage's nodes and figures: hours, GB on disk, GB of one GPU, money (None without a price). `rate`: tokens/s."""

    name: str
    nodes: int
    hours: Figure
    disk_gb: Figure
    gpu_gb: Figure
    money: Figure | None
    rate: Figure | None = None

    def to_json(self) -> dict[str, Any]:
        names = ("hours", "disk_gb", "gpu_gb", "money", "rate")
        figures = {name: figure.to_json() for name in names if (figure := getattr(self, name)) is not None}
        return {"stage": self.name, "nodes": self.nodes, **figures}


@dataclass(frozen=True)
class Page:
    """The plan: its stages, the sums and what a reader must know. `disk_money`: None without a price."""

    case: Case
    stages: list[Stage]
    hours: Figure
    disk_gb: Figure
    disk_money: Figure | None
    notes: list[str]

    @property
    def money(self) -> Figure | None:
        """GPUs and disks; None without the price of a GPU."""
        parts = [stage.money for stage in self.stages if stage.money] + [self.disk_money] * (
            self.disk_money is not None
        )
        found = [part for part in parts if part is not None]
        if any(stage.money is None for stage in self.stages):
            return None
        return total(
            found, "GPUs" + (" and disks" if self.disk_money else ", without disks (plan.disk_tb_month_price)")
        )

    def to_json(self) -> dict[str, Any]:
        case = self.case
        totals = {"hours": self.hours, "disk_gb": self.disk_gb, "disk_money": self.disk_money, "money": self.money}
        return {
            "target": str(case.recipe.target.path),
            "method": case.recipe.training().draft.method,
            "hardware": case.fleet.hardware,
            "nodes": case.fleet.nodes,
            "gpus_per_node": case.fleet.node.num_gpus,
            "conversations": case.conversations,
            "mean_tokens": case.recipe.plan.mean_tokens,
            "tokens": case.tokens,
            "stages": [stage.to_json() for stage in self.stages],
            "total": {name: figure.to_json() for name, figure in totals.items() if figure is not None},
            "notes": self.notes,
        }


def make_page(case: Case) -> Page:
    """Plan all stages."""
    synth, train, bench = _plan_synth(case), _plan_train(case), _plan_bench(case)
    dump = _plan_dump(case, train)
    notes = _notes(case, train)
    stages = [synth, dump, train, bench]
    if case.window_gb is None:
        hours = total([stage.hours for stage in stages], "sum")
    else:
        beside = max((dump.hours, train.hours), key=lambda figure: figure.value)
        how = "synth + the longer one of dump and train, side by side + bench"
        if capture_nodes(case, train.nodes) + train.nodes > case.fleet.nodes:
            beside, how = total([dump.hours, train.hours], "sum"), "sum: dump and train share the nodes"
        hours = total([synth.hours, beside, bench.hours], how)
    disk = total((stage.disk_gb for stage in stages), "sum: nothing is deleted before the last stage")
    price = case.recipe.plan.disk_tb_month_price
    disk_money = None
    if price is not None:
        paid = disk.value / 1000 * price * hours.value / HOURS_PER_MONTH
        how = f"{disk.value / 1000:.2f} TB x {price:g} x {hours.value:.1f} of {HOURS_PER_MONTH} h"
        disk_money = Figure(paid, least_certain([disk.kind, hours.kind]), how)
    return Page(case, stages, hours, disk, disk_money, notes)


def training_gpus(recipe: Recipe, gpus: int) -> int:
    """Return how many of some GPUs can train: each needs a sample of every batch."""
    return min(gpus, recipe.training().batch_size)


def capture_nodes(case: Case, training: int) -> int:
    """Return how many nodes capture a rolling store beside `training` nodes that train: the others, else all.

    Raises UserError if the target takes all GPUs, so that none is left to train.
    """
    fleet = case.fleet
    others = fleet.nodes - training
    if others * fleet.node.num_gpus >= fleet.replica_gpus:
        return others
    if fleet.nodes * fleet.node.num_gpus > fleet.replica_gpus:
        return fleet.nodes
    raise UserError(
        "--window",
        found=f"{fleet.nodes} x {fleet.hardware}, all of whose GPUs hold the target",
        expected="GPUs that train while the others capture",
        fix="Take another node, or a whole store.",
    )


def _stage(case: Case, name: str, nodes: int, figures: tuple[Figure, Figure, Figure], rate: Figure | None) -> Stage:
    """Return a stage with its money. `figures`: hours, disk, memory of a GPU."""
    hours, disk, memory = figures
    price, gpus = case.recipe.plan.gpu_hour_price, nodes * case.fleet.node.num_gpus
    money = None
    if price is not None:
        how = f"{hours.value:.2f} h x {gpus} GPUs x {price:g}"
        money = Figure(hours.value * gpus * price, least_certain([hours.kind, "stated"]), how)
    return Stage(name, nodes, hours, disk, memory, money, rate)


def _serving_memory(case: Case) -> Figure:
    fleet = case.fleet
    held = fleet.weights / fleet.replica_gpus / 1e9
    weights = f"{fleet.weights / 1e9:.0f} GB of weights ({fleet.weights_source})"
    how = f"{weights} on {fleet.replica_gpus} GPUs; KV cache beside"
    return Figure(held, "stated" if "estimate" not in fleet.weights_source else "estimated", how)


def _pick_rate(measured: Figure | None, stated: float | None, key: str, estimated: Figure, nodes: int) -> Figure:
    """Return the tokens/s of all nodes: measured on one, stated for one, or estimated."""
    if measured is not None:
        return Figure(measured.value * nodes, "measured", f"{nodes} nodes x {measured.value:.0f} ({measured.how})")
    if stated is not None:
        return Figure(stated * nodes, "stated", f"{nodes} nodes x {stated:g} (plan.{key})")
    return estimated


def _hours(tokens: float, what: str, rate: Figure, start_minutes: float) -> Figure:
    how = f"{tokens:.4g} {what} / {rate.value:.0f} tokens/s"
    if rate.kind != "measured":  # a measured one has the start in it
        how += f" + {start_minutes:g} min start"
    started = 0.0 if rate.kind == "measured" else start_minutes / 60
    return Figure(tokens / rate.value / 3600 + started, least_certain([rate.kind]), how)


def _plan_synth(case: Case) -> Stage:
    plan, fleet = case.recipe.plan, case.fleet
    estimate = fleet.generation_rate(plan.mean_tokens, case.recipe.synth.max_concurrency * fleet.nodes)
    rate = _pick_rate(case.measured.synth, plan.synth_tokens_per_s, "synth_tokens_per_s", estimate, fleet.nodes)
    generated = case.tokens * (1 - plan.prompt_share)
    disk = Figure(
        case.tokens * TEXT_BYTES_PER_TOKEN / 1e9,
        "estimated",
        f"{case.tokens:.4g} tokens x {TEXT_BYTES_PER_TOKEN} bytes of text and ids",
    )
    hours = _hours(generated, "generated tokens", rate, plan.start_minutes)
    return _stage(case, "synth", fleet.nodes, (hours, disk, _serving_memory(case)), rate)


def _plan_dump(case: Case, train: Stage) -> Stage:
    """Plan the capture: once, or, for a rolling store, once an epoch on the nodes that do not train."""
    plan, fleet = case.recipe.plan, case.fleet
    per_sample = stored_bytes(case.recipe, case.target, plan.mean_tokens)
    tokens, what = float(case.tokens), "tokens"
    if case.window_gb is None:
        disk = Figure(
            case.conversations * per_sample / 1e9,
            "estimated",
            f"{case.conversations} samples x {per_sample} bytes ({case.recipe.dump.dtype}, `dump plan`)",
        )
    else:
        fleet = fleet.with_nodes(capture_nodes(case, train.nodes))
        tokens, what = float(case.epoch * plan.mean_tokens), "tokens of all epochs"
        disk = Figure(case.window_gb, "stated", "dump run --window")
    rate = _pick_rate(
        case.measured.dump, plan.dump_tokens_per_s, "dump_tokens_per_s", fleet.prefill_rate(), fleet.nodes
    )
    hours = _hours(tokens, what, rate, plan.start_minutes)
    return _stage(case, "dump", fleet.nodes, (hours, disk, _serving_memory(case)), rate)


def _plan_train(case: Case) -> Stage:
    """Plan the training from the JSON of `train plan`."""
    section, train, plan = case.recipe.training(), case.train, case.recipe.plan
    gpus = int(train["gpus"])
    nodes = ceil(gpus / case.fleet.node.num_gpus)
    computing = float(train["seconds_per_step"]["compute"])
    reading = 0.0
    if plan.read_gb_per_s:
        reading = train["bytes_read_per_step"] / (plan.read_gb_per_s * 1e9 * nodes)
    seconds = max(computing, reading)
    if reading > computing:
        limit = f"reading {train['bytes_read_per_step'] / 1e9:.2f} GB at {nodes} x {plan.read_gb_per_s:g} GB/s"
    else:
        limit = f"{train['flops_per_step_and_rank'] / 1e12:.0f} TFLOP a GPU at an MFU of {train['mfu']:.0%}"
    kind = "measured" if case.measured.run else "stated" if plan.mfu else "estimated"
    hours = Figure(
        section.num_steps * seconds / 3600,
        least_certain([kind]),  # type: ignore[list-item]
        f"{section.num_steps} steps x {seconds:.3f} s ({limit}), without evaluations and communication (`train plan`)",
    )
    kept = section.keep_checkpoints + (2 if section.held_out_fraction else 1)
    disk = Figure(
        kept * BYTES_PER_PARAMETER * train["parameters"] / 1e9,
        "estimated",
        f"{kept} checkpoints x {BYTES_PER_PARAMETER} bytes x {train['parameters'] / 1e6:.0f}M parameters",
    )
    layout = "single" if gpus == 1 else f"{section.parallel} x{gpus}"
    memory = Figure(
        sum(train["memory_bytes"][layout].values()) / 1e9,
        "estimated",
        f"peak of {layout}, {train['samples_per_rank']} x {case.recipe.target.max_model_len} tokens (`train plan`)",
    )
    return _stage(case, "train", nodes, (hours, disk, memory), None)


def _plan_bench(case: Case) -> Stage:
    """Plan `bench acceptance --conversations`: servers without a draft, with K = 1 and with the draft's own K."""
    plan, fleet = case.recipe.plan, case.fleet
    reply, servers = plan.mean_tokens * (1 - plan.prompt_share), 3
    seconds, parts = 0.0, []
    for concurrency in case.recipe.bench.concurrency:
        number = case.recipe.bench.num_prompts.get(concurrency, plan.bench_conversations)
        rate = fleet.decode_rate(concurrency, plan.mean_tokens / 2)
        seconds += number * reply / rate.value
        parts.append(f"{number} replies, {concurrency} at once, at {rate.value:.0f} tokens/s")
    how = (
        f"{servers} servers x ({plan.start_minutes:g} min start + {', '.join(parts)}), as if the draft gained nothing; "
        "on one replica"
    )
    hours = Figure(servers * (plan.start_minutes / 60 + seconds / 3600), "estimated", how)
    nodes = ceil(fleet.replica_gpus / fleet.node.num_gpus)
    disk = Figure(2 * case.train["parameters"] / 1e9, "estimated", "the exported draft in bfloat16")
    return _stage(case, "bench", nodes, (hours, disk, _serving_memory(case)), None)


def _notes(case: Case, train: Stage) -> list[str]:
    """Return what a reader of the figures must know."""
    fleet, section, notes = case.fleet, case.recipe.training(), list[str]()
    available = fleet.nodes * fleet.node.num_gpus
    if int(case.train["gpus"]) < available:
        notes.append(
            f"training uses {case.train['gpus']} of {available} GPUs: a batch has {section.batch_size} samples "
            "(train.global_batch_size / gradient_accumulation_steps), and each GPU needs one"
        )
    if fleet.replica_gpus > fleet.node.num_gpus:
        number = fleet.replica_gpus // fleet.node.num_gpus
        notes.append(f"the target needs {number} nodes for one replica: vLLM over several nodes")
    layout = "single" if case.train["gpus"] == 1 else f"{section.parallel} x{case.train['gpus']}"
    if not case.train["fits"][layout]:
        changes = [change["change"] for change in case.train["changes_that_fit"]]
        advice = f"; fits with {changes[0]}" if changes else "; `train plan` knows no change that fits"
        notes.append(f"training does not fit into {fleet.node.gpu_memory_gb} GB: {train.gpu_gb.value:.0f} GB{advice}")
    if case.window_gb is not None and capture_nodes(case, train.nodes) == fleet.nodes:
        notes.append("capture and training share the nodes: give each some GPUs of a node (CUDA_VISIBLE_DEVICES)")
    return notes

"""Compute what a training takes before it starts: memory, operations, bytes to read and hours; refuse what cannot fit.

Reads: the recipe and the target's config; a store's lengths and masks, if there is one. Nothing is computed: see
train/footprint.py.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.memory import free_memory
from contracts.draft import DraftConfig, DraftRun
from contracts.sample_file import SampleForm
from contracts.store import Store
from recipe.hardware import find_node
from recipe.recipe import Recipe
from recipe.train import TrainSection
from target.target import Target
from train.draft import suppose_config
from train.footprint import Footprint, Parallel, Work, count_flops, count_parameters, measure_drafting, measure_step

CONTEXT_BYTES = 2_000_000_000
"""GPU memory of the CUDA context, the libraries' workspaces and NCCL. An estimate, not measured here."""
SAFE_FACTOR = 20
"""On CPUs, a step is not planned if this many times its weights, head and batch fit: its activations take less."""
KEPT_FACTOR = 1.2
"""On CPUs, glibc keeps some freed memory: 3 to 19% of the steps in tests/train/test_plan.py."""


@dataclass(frozen=True)
class Machine:
    """A GPU, or this machine's CPU. `memory`: bytes for one rank; `tflops`: of dense bf16 products, None if unknown."""

    name: str
    on_gpu: bool
    memory: int
    tflops: float | None = None

    @classmethod
    def named(cls, name: str) -> Machine:
        """Look up a GPU of `recipe.hardware`, or "cpu" for this machine. Raises UserError for an unknown name."""
        if name == "cpu":
            return cls.here(torch.device("cpu"))
        node = find_node(name, "--gpu")
        return cls(name, True, int(node.gpu_memory_gb * 1e9), node.gpu_tflops)

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Return this process's device with the memory that is free now; processes of a node share a CPU's."""
        if device.type == "cuda":
            return cls(torch.cuda.get_device_name(device), True, torch.cuda.mem_get_info(device)[0])
        return cls("this machine", False, free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def holds(self, num_bytes: int) -> bool:
        """Return whether a step of `num_bytes` fits, with what the device's libraries take or keep."""
        return (num_bytes + CONTEXT_BYTES if self.on_gpu else num_bytes * KEPT_FACTOR) <= self.memory


@dataclass(frozen=True)
class Question:
    """What `train plan` is asked: the hardware, the data, and rates to compute hours from.

    Memory is that of batches of the longest samples, hours are those of samples of `mean_tokens`. `prompt_share`: the
    share of a sample's tokens that are not supervised. `dtype`: of the stored states. `top_k`: of a store with the most
    likely tokens in place of final states. `mfu`: share of the GPU's peak
    that training reaches. `read_rate`: GB/s that a node reads.
    """

    machine: Machine
    num_gpus: int
    gpus_per_node: int
    max_tokens: int
    mean_tokens: int
    prompt_share: float
    dtype: str
    mfu: float
    read_rate: float | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class TrainPlan:
    """The answer. `samples`: of one rank's batch. `memory`: bytes by kind, for each layout of processes; `drafting`:
    those of an evaluation. `fitting`: changes of the recipe with which it fits, and the bytes it then takes.
    """

    config: DraftConfig
    section: TrainSection
    question: Question
    samples: int
    parameters: int
    memory: dict[str, dict[str, int]]
    drafting: dict[str, int]
    flops: float
    bytes_read: int
    fitting: list[tuple[str, int]] = field(default_factory=list)

    @property
    def compute_seconds(self) -> float | None:
        """Seconds of a step's operations on one rank."""
        tflops = self.question.machine.tflops
        return self.flops / (tflops * 1e12 * self.question.mfu) if tflops else None

    @property
    def read_seconds(self) -> float | None:
        """Seconds in which the nodes read a step's states."""
        nodes = math.ceil(self.question.num_gpus / self.question.gpus_per_node)
        rate = self.question.read_rate
        return self.bytes_read / (rate * 1e9 * nodes) if rate else None

    def to_json(self) -> dict[str, Any]:
        return {
            "hardware": self.question.machine.name,
            "gpus": self.question.num_gpus,
            "samples_per_rank": self.samples,
            "parameters": self.parameters,
            "memory_bytes": self.memory,
            "evaluation_bytes": self.drafting,
            "fits": {name: self.question.machine.holds(sum(kinds.values())) for name, kinds in self.memory.items()},
            "flops_per_step_and_rank": self.flops,
            "bytes_read_per_step": self.bytes_read,
            "seconds_per_step": {"compute": self.compute_seconds, "reading": self.read_seconds},
            "mfu": self.question.mfu,
            "num_steps": self.section.num_steps,
            "changes_that_fit": [{"change": change, "bytes": size} for change, size in self.fitting],
        }


@dataclass(frozen=True)
class Request:
    """The options of `train plan`."""

    store: Path | None
    gpu: str | None
    gpus: int | None
    mean_tokens: int
    prompt_share: float
    mfu: float
    run: Path | None
    read_rate: float | None


def answer(recipe: Recipe, request: Request, *, as_json: bool) -> TrainPlan:
    """Plan what the options ask for, and print it."""
    target = Target.of(recipe.target)
    config = suppose_config(recipe, target)
    name = request.gpu or recipe.serve.hardware or "h100"
    machine, per_node = Machine.named(name), 1 if name == "cpu" else find_node(name, "--gpu").num_gpus
    max_tokens, mean_tokens, prompt_share = recipe.target.max_model_len, request.mean_tokens, request.prompt_share
    dtype: str = recipe.dump.dtype
    top_k = recipe.dump.top_k if recipe.dump.final_states == "top-k" else None
    if request.store is not None:
        manifest = Store(request.store).read_manifest()
        dtype, top_k = manifest.dtype, manifest.top_k
        max_tokens, mean_tokens, prompt_share = _describe_store(Store(request.store), max_tokens)
    question = Question(
        machine,
        num_gpus=request.gpus or per_node,
        gpus_per_node=per_node,
        max_tokens=max_tokens,
        mean_tokens=min(mean_tokens, max_tokens),
        prompt_share=prompt_share,
        dtype=dtype,
        mfu=request.mfu,
        read_rate=request.read_rate,
        top_k=top_k,
    )
    plan = make_plan(recipe, target, config, question)
    if request.run is not None:
        plan = replace(plan, question=replace(question, mfu=_measure_mfu(plan, DraftRun(request.run))))
    if as_json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        show_plan(plan)
    return plan


def _describe_store(store: Store, max_tokens: int) -> tuple[int, int, float]:
    """Return the longest and the mean length of a store's samples, and the share of prompts in some of them."""
    lengths = {id_: min(length, max_tokens) for id_, length in store.lengths().items()}
    if not lengths:
        raise UserError(store.folder, found="no sample", expected="some", fix="Give a store that has some.")
    drawn = random.Random(0).sample(sorted(lengths), min(32, len(lengths)))
    masks = torch.cat([store.read_mask(id_)[:max_tokens] for id_ in drawn])
    return max(lengths.values()), round(statistics.mean(lengths.values())), 1.0 - float(masks.float().mean())


def _measure_mfu(plan: TrainPlan, run: DraftRun) -> float:
    """Return the MFU of a run from the tokens/s in its metrics. Raises UserError if there are none."""
    lines = map(json.loads, run.metrics_path.read_text().splitlines()) if run.metrics_path.exists() else ()
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    tflops = plan.question.machine.tflops
    if not rates or tflops is None:
        raise UserError(
            run.metrics_path,
            found="no tokens/s" if tflops else f"no peak of {plan.question.machine.name}",
            expected="the metrics of a run on the GPU that --gpu names",
            fix="Give --mfu instead.",
        )
    tokens = plan.section.global_batch_size * plan.question.mean_tokens
    seconds = tokens / statistics.median(rates[len(rates) // 2 :])
    return plan.flops / seconds / (tflops * 1e12)


def suppose_masks(num_samples: int, num_tokens: int, prompt_share: float = 0.0) -> list[torch.Tensor]:
    """Return the loss masks of equal documents: a prompt, then generated tokens."""
    return [torch.arange(num_tokens) >= int(num_tokens * prompt_share)] * num_samples


def work_of(
    section: TrainSection,
    config: DraftConfig,
    target: Target,
    masks: list[torch.Tensor],
    on_gpu: bool,
    top_k: int | None = None,
) -> Work:
    """Return the work of a rank's step over documents with these loss masks. `top_k`: of the store, if it has them."""
    needed = section.draft.needs_final_states
    return Work(
        config,
        section.draft,
        masks,
        on_gpu,
        tied=target.is_tied,
        has_final_states=needed and top_k is None,
        gradient_checkpointing=section.gradient_checkpointing,
        top_k=top_k if needed else None,
    )


def make_plan(recipe: Recipe, target: Target, config: DraftConfig, question: Question) -> TrainPlan:
    """Plan a training for one rank alone, and for DDP and FSDP2 on `question.num_gpus`."""
    section, machine = recipe.training(), question.machine
    samples = math.ceil(section.batch_size / question.num_gpus)

    def of(changed: TrainSection, number: int, num_tokens: int) -> Work:
        return work_of(changed, config, target, suppose_masks(number, num_tokens), machine.on_gpu, question.top_k)

    size = (samples, question.max_tokens)
    memory = {name: _peak_of(of, section, size, layout) for name, layout in _layouts(question.num_gpus).items()}
    usual_masks = suppose_masks(1, question.mean_tokens, question.prompt_share)
    usual = work_of(section, config, target, usual_masks, machine.on_gpu, question.top_k)
    state = "none" if not section.draft.needs_final_states else "top-k" if question.top_k else "pre-norm"
    form = SampleForm(
        config.hidden_size, len(config.layer_ids), question.dtype, state, question.top_k, config.vocab_size
    )
    num_predicting = round(question.mean_tokens * (1 - question.prompt_share))
    read = form.num_bytes(question.mean_tokens, num_predicting=num_predicting)
    plan = TrainPlan(
        config=config,
        section=section,
        question=question,
        samples=samples,
        parameters=count_parameters(usual),
        memory=memory,
        drafting=measure_drafting(of(section, 1, question.max_tokens)).peak(),
        flops=count_flops(usual) * samples * section.gradient_accumulation_steps,
        bytes_read=read * section.global_batch_size,
    )
    planned = plan.memory[_name(section.parallel, question.num_gpus)]
    return plan if machine.holds(sum(planned.values())) else replace(plan, fitting=list(_find_fitting(plan, of)))


def _layouts(num_gpus: int) -> dict[str, tuple[Parallel, int]]:
    """Return parallelism and number of ranks by name."""
    found: dict[str, tuple[Parallel, int]] = {"single": ("single", 1)}
    if num_gpus > 1:
        found |= {_name("ddp", num_gpus): ("ddp", num_gpus), _name("fsdp2", num_gpus): ("fsdp2", num_gpus)}
    return found


def _name(parallel: Parallel, num_gpus: int) -> str:
    return f"{parallel} x{num_gpus}" if num_gpus > 1 else "single"


def _peak_of(
    of: Callable[[TrainSection, int, int], Work],
    section: TrainSection,
    size: tuple[int, int],
    layout: tuple[Parallel, int],
) -> dict[str, int]:
    """Return the bytes by kind of a step over `size`: samples, and tokens of each.

    From some number of samples on they lie on a line: once the peak is at the same moment of the step, no kind falls.
    """
    samples, num_tokens = size

    def peak(number: int) -> dict[str, int]:
        return measure_step(of(section, number, num_tokens)).peak(*layout)

    low, high = 1, 2
    if samples <= high:
        return peak(samples)
    less, more = peak(low), peak(high)
    while any(more[kind] < less[kind] for kind in less):
        low, high = high, 2 * high
        if samples <= high:
            return peak(samples)
        less, more = more, peak(high)
    return {kind: less[kind] + (samples - low) * (more[kind] - less[kind]) // (high - low) for kind in less}


def _find_fitting(plan: TrainPlan, of: Callable[[TrainSection, int, int], Work]) -> Iterator[tuple[str, int]]:
    """Yield changes of the recipe with which a step fits on all GPUs, and the bytes it then takes."""
    section, question, tokens = plan.section, plan.question, plan.question.max_tokens
    smaller = section.draft.to_save_memory()
    draft = section.draft.model_copy(update=smaller)
    accumulated = section.gradient_accumulation_steps * plan.samples
    batches = {
        "": (plan.samples, tokens),
        f"train.gradient_accumulation_steps: {accumulated}": (1, tokens),
        f"train.gradient_accumulation_steps: {accumulated}, target.max_model_len: {tokens // 2}": (1, tokens // 2),
    }
    sections = {"": section}
    if not section.gradient_checkpointing:
        saving = section.model_copy(update={"gradient_checkpointing": True})
        sections["train.gradient_checkpointing: true"] = saving
    if smaller:
        words = ", ".join(f"train.draft.{key}: {value}" for key, value in smaller.items())
        sections[words] = section.model_copy(update={"draft": draft})
    parallels: dict[str, Parallel] = {"": "ddp" if question.num_gpus > 1 else "single"}
    if question.num_gpus > 1:
        parallels["train.parallel: fsdp2"] = "fsdp2"
    for (batch, size), (change, changed) in itertools.product(batches.items(), sections.items()):
        for parallel, layout in parallels.items():
            words = ", ".join(filter(None, (batch, change, parallel)))
            peak = sum(_peak_of(of, changed, size, (layout, question.num_gpus)).values())
            if words and question.machine.holds(peak):
                yield words, peak


def show_plan(plan: TrainPlan) -> None:
    """Print a plan."""
    question, section, machine = plan.question, plan.section, plan.question.machine
    print(f"draft      {plan.config.method}, {plan.parameters / 1e6:.1f}M parameters")
    batches = f"in {section.gradient_accumulation_steps} batches"
    print(f"training   {section.num_steps} steps of {section.global_batch_size} samples {batches}")
    print(f"hardware   {question.num_gpus} x {machine.name}, {machine.memory / 1e9:.1f} GB")
    print(f"memory     of one rank in GB, for {plan.samples} samples of {question.max_tokens} tokens")
    names = list(plan.memory)
    print("           " + " " * 12 + "".join(f"{name:>14}" for name in names) + f"{'evaluation':>14}")
    columns = [*plan.memory.values(), plan.drafting]
    for kind in columns[0]:
        print(f"           {kind:<12}" + "".join(f"{column[kind] / 1e9:>14.2f}" for column in columns))
    totals = [sum(column.values()) for column in columns]
    print("           " + f"{'peak':<12}" + "".join(f"{total / 1e9:>14.2f}" for total in totals))
    verdicts = ["fits" if machine.holds(total) else "does not fit" for total in totals]
    print("           " + " " * 12 + "".join(f"{verdict:>14}" for verdict in verdicts))
    if machine.on_gpu:
        print(f"           {CONTEXT_BYTES / 1e9:g} GB more are kept for CUDA and NCCL (an estimate)")
    for change, size in plan.fitting:
        print(f"fits with  {change}: {size / 1e9:.2f} GB")
    if not plan.fitting and not machine.holds(totals[-2]):
        print("fits with  no change known here: take a smaller draft, or GPUs with more memory")
    print(f"operations {plan.flops / 1e12:.1f} TFLOP a step and rank, for samples of {question.mean_tokens} tokens")
    _show_hours(plan)


def _show_hours(plan: TrainPlan) -> None:
    question, compute, reading = plan.question, plan.compute_seconds, plan.read_seconds
    if compute is None:
        print("hours      not known for this hardware: name a GPU with --gpu")
        return
    print(f"compute    {compute:.3f} s a step at an MFU of {question.mfu:.0%} (--mfu, assumed unless measured)")
    nodes = math.ceil(question.num_gpus / question.gpus_per_node)
    needed = plan.bytes_read / compute / nodes / 1e9
    print(f"reading    {plan.bytes_read / 1e9:.2f} GB a step; a node must read {needed:.2f} GB/s to keep up")
    if reading is None:
        print("           give --read-rate, the GB/s that a node reads from the store")
    step = max(compute, reading or 0.0)
    limit = "reading" if reading and reading > compute else "compute"
    print(
        f"hours      {step * plan.section.num_steps / 3600:.2f}, limited by {limit}; without evaluations and start-up"
    )


def refuse_unfit(
    what: str, machine: Machine, work: Work, measure: Callable[[Work], Footprint], layout: tuple[Parallel, int]
) -> None:
    """Raise UserError if `work` does not fit into the machine's memory. `layout`: parallelism, number of ranks."""
    if not machine.on_gpu and SAFE_FACTOR * _least_bytes(work) < machine.memory:
        return
    kinds = measure(work).peak(*layout)
    total = sum(kinds.values())
    if machine.holds(total):
        return
    parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds.items() if size)
    raise UserError(
        f"{what} on {machine.name}",
        found=f"{machine.memory / 1e9:.2f} GB free for one process",
        expected=f"{total / 1e9:.2f} GB ({parts}) for {len(work.loss_masks)} samples, {work.num_tokens} tokens",
        fix="`train plan` lists changes that fit; or pass --force.",
    )


def _least_bytes(work: Work) -> int:
    """Return the bytes of a step without its activations, in fp32."""
    head = 8 * work.config.vocab_size * work.config.hidden_size
    return 16 * count_parameters(work) + head + work.states_bytes

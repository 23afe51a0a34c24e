"""Memory and floating-point operations of a step at any size, without computing it.

The step runs on tensors that have shapes and no values: on torch's meta device in place of a GPU, as fake CPU tensors
in place of a CPU, whose kernels differ. A dispatch mode sees every storage that the step makes and frees.

On GPUs, a parameter takes 4 bytes, its bf16 copy under autocast 2, its gradient 4 and AdamW's two moments 8. The step
runs in bf16 there, since meta tensors know no autocast, and the sizes of weights and gradients are scaled. A GPU holds
two batches: the next one is copied during a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from contracts.draft import DraftConfig
from contracts.top_tokens import TopTokens
from drafts import METHODS
from drafts.attention import forget_buffers
from drafts.batch import Batch
from drafts.draft import PLACES_AT_ONCE, Draft
from drafts.method import DraftSection
from drafts.moving import tensors_of, to_device
from target.head import TargetHead

KINDS = ("weights", "gradients", "optimizer", "head", "batch", "activations", "logits")
WEIGHTS, GRADIENTS, OPTIMIZER, HEAD, BATCH, ACTIVATIONS, LOGITS = range(len(KINDS))
META = torch.device("meta")
CPU = torch.device("cpu")
Parallel = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Work:
    """What a step works on: a draft, a head, and the documents of one rank's batch.

    `loss_masks`: one per document, (T,). `on_gpu`: the device, which decides kernels and dtypes. `tied`: embedding and
    lm_head are one tensor. `has_final_states`: the batch holds the target's final states. `top_k`: it holds that many
    of its most likely tokens instead.
    """

    config: DraftConfig
    section: DraftSection
    loss_masks: Sequence[torch.Tensor]
    on_gpu: bool
    tied: bool = False
    has_final_states: bool = True
    gradient_checkpointing: bool = False
    top_k: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.loss_masks))

    @property
    def states_bytes(self) -> int:
        """Bytes of the batch's hidden states on the device."""
        width = self.config.hidden_size * (len(self.config.layer_ids) + self.has_final_states)
        return self.num_tokens * width * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states, head and products."""
        return torch.bfloat16 if self.on_gpu else torch.float32


@dataclass(frozen=True)
class Footprint:
    """Memory of a step over time in bytes, by `KINDS`.

    `parameters`: their number; `root`: of those outside of the layers that FSDP2 shards one by one; `largest_layer`: of
    those of the largest such layer.
    """

    parameters: int
    root: int
    largest_layer: int
    on_gpu: bool
    events: list[tuple[int, ...]]

    def peak(self, parallel: Parallel = "single", world: int = 1) -> dict[str, int]:
        """Return the bytes of one rank by kind, at the moment when they are most.

        DDP keeps all gradients in its buckets. FSDP2 keeps a share of weights, gradients and optimizer; it gathers the
        root's parameters and two layers in bf16, and reduces the gradients of the root or of one layer in fp32.
        """
        copy = 2 if self.on_gpu else 4

        def of_rank(event: tuple[int, ...]) -> tuple[int, ...]:
            values = list(event)
            if parallel == "ddp":
                values[GRADIENTS] = 4 * self.parameters
            elif parallel == "fsdp2":
                # Without the bf16 copies of all parameters at once, which autocast makes.
                values[WEIGHTS] = 4 * self.parameters // world + copy * (self.root + 2 * self.largest_layer)
                values[GRADIENTS] = event[GRADIENTS] // world + (copy + 4) * max(self.root, self.largest_layer)
                values[OPTIMIZER] = event[OPTIMIZER] // world
            return tuple(values)

        most = max(map(of_rank, self.events), key=sum)
        return dict(zip(KINDS, most, strict=True))


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages by kind, as operations make them and until they are freed."""

    def __init__(self, vocab_size: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.events: list[tuple[int, ...]] = []
        self._vocab_size, self._scales = vocab_size, scales
        self._now = [0] * len(KINDS)
        self._live = dict[int, tuple[int, int]]()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf, LOGITS if leaf.shape[-1:] == (self._vocab_size,) else ACTIVATIONS)
        return result

    def note(self, tensor: torch.Tensor, kind: int) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        if id(storage) in self._live:
            return
        weakref.finalize(storage, self._free, id(storage))
        self._live[id(storage)] = (kind, storage.nbytes())
        self._add(kind, storage.nbytes())

    def move(self, tensor: torch.Tensor, kind: int) -> None:
        """Count a tensor's storage as another kind from here on."""
        key = id(tensor.untyped_storage())
        if key in self._live:
            before, size = self._live[key]
            self._now[before] -= size * self._scales[before]
            self._live[key] = (kind, size)
            self._add(kind, size)

    def _add(self, kind: int, size: int) -> None:
        self._now[kind] += size * self._scales[kind]
        self.events.append(tuple(self._now))

    def _free(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._now[kind] -= size * self._scales[kind]


def count_parameters(work: Work) -> int:
    """Return the number of the draft's parameters."""
    with META:
        draft = METHODS[work.config.method].build(work.config, work.section)
    return sum(p.numel() for p in draft.parameters())


def measure_step(work: Work) -> Footprint:
    """Return the footprint of a training step in its steady state, when the optimizer has its moments."""
    with _setting(work) as scene:
        draft, meter, batch = scene.draft.train(), scene.meter, _make_batch(work, scene)
        plan = draft.plan(batch)
        with scene.without_values, meter:
            batch, plan = to_device((batch, plan), scene.device)
            for tensor in (batch.aux_hidden_states, batch.hidden_states, *tensors_of(batch.top)):
                meter.note(tensor, BATCH)
            for parameter in draft.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: meter.move(p.grad, GRADIENTS))
            moments = [torch.empty(2 * p.numel(), dtype=torch.float32, device=p.device) for p in draft.parameters()]
            for moment in moments:
                meter.move(moment, OPTIMIZER)
            result = draft(batch, plan, scene.head)
            (result.loss_sum / plan.num_slots).backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        return _finish(work, scene)


def count_flops(work: Work) -> int:
    """Return the operations of a training step. (Beside a `Meter`, the counter would keep recomputed tensors alive.)"""
    with _setting(work) as scene:
        draft, batch = scene.draft.train(), _make_batch(work, scene)
        plan = draft.plan(batch)
        counter = FlopCounterMode(display=False)
        with scene.without_values, counter:
            batch, plan = to_device((batch, plan), scene.device)
            draft(batch, plan, scene.head).loss_sum.backward()
        return int(counter.get_total_flops())


def measure_drafting(work: Work) -> Footprint:
    """Return the footprint of an evaluation: drafting after the last positions of one document."""
    with _setting(work) as scene, torch.inference_mode():
        draft, batch = scene.draft.eval(), _make_batch(work, scene)
        places = draft.places(batch.loss_mask)[-PLACES_AT_ONCE:]
        plan = draft.plan_drafting(batch.token_ids, batch.loss_mask, places)
        with scene.without_values, scene.meter:
            batch, plan = to_device((batch, plan), scene.device)
            scene.meter.note(batch.aux_hidden_states, BATCH)
            draft.draft_planned(batch.token_ids, batch.aux_hidden_states, plan, scene.head)
        return _finish(work, scene)


@dataclass(frozen=True)
class _Scene:
    """A draft and a head without values, on `device`, within `without_values`."""

    draft: Draft
    head: TargetHead
    meter: Meter
    device: torch.device
    without_values: AbstractContextManager[Any]


@contextmanager
def _setting(work: Work) -> Iterator[_Scene]:
    """Build draft and head without values. One thread: dispatch modes are per thread."""
    fake = nullcontext() if work.on_gpu else FakeTensorMode(allow_non_fake_inputs=True)
    device = META if work.on_gpu else CPU
    meter = Meter(work.config.vocab_size, (3, 2, 1, 1, 2, 1, 1) if work.on_gpu else (1,) * len(KINDS))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_buffers()
    try:
        with fake, device:
            method = METHODS[work.config.method]
            draft = method.build(work.config, work.section, gradient_checkpointing=work.gradient_checkpointing)
            if work.on_gpu:
                draft.to(META, work.dtype)
            embedding = torch.empty(work.config.vocab_size, work.config.hidden_size, dtype=work.dtype)
            lm_head = embedding if work.tied else torch.empty_like(embedding)
            head = TargetHead(embedding, lm_head, torch.empty(work.config.hidden_size), "rms", 1e-6)
        draft.suppose_values()
        for parameter in draft.parameters():
            meter.note(parameter, WEIGHTS)
        for tensor in (embedding, lm_head):
            meter.note(tensor, HEAD)
        yield _Scene(draft, head, meter, device, fake)
    finally:
        forget_buffers()
        torch.set_num_threads(num_threads)


def _make_batch(work: Work, scene: _Scene) -> Batch:
    """Return a batch with real masks; its states have no values, its tokens are the vocabulary's first."""
    lengths, hidden = [len(mask) for mask in work.loss_masks], work.config.hidden_size
    widths = (len(work.config.layer_ids) * hidden, hidden * work.has_final_states)
    with scene.without_values, scene.device:
        states = [torch.empty(work.num_tokens, width, dtype=work.dtype) for width in widths]
        top = None if work.top_k is None else _make_top(work.num_tokens, work.top_k)
    return Batch(
        token_ids=torch.zeros(work.num_tokens, dtype=torch.long),
        loss_mask=torch.cat(list(work.loss_masks)),
        aux_hidden_states=states[0],
        hidden_states=states[1],
        lengths=lengths,
        sample_ids=[str(number) for number in range(len(lengths))],
        seeds=list(range(len(lengths))),
        top=top,
    )


def _make_top(num_tokens: int, top_k: int) -> TopTokens:
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32)
    return TopTokens(ids, torch.empty(num_tokens, top_k + 1, dtype=torch.float16))


def _finish(work: Work, scene: _Scene) -> Footprint:
    layers = [sum(p.numel() for p in layer.parameters()) for layer in scene.draft.layers_to_shard()]
    parameters = sum(p.numel() for p in scene.draft.parameters())
    return Footprint(parameters, parameters - sum(layers), max(layers, default=0), work.on_gpu, scene.meter.events)

"""The base class of all draft modules: what the trainer, `train eval` and `bench parity` call.

A training step is `plan` on the CPU (anchors, labels, masks) and `forward` to a loss. Parameters are named as in the
exported checkpoint; embedding and lm_head are the target's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from contracts.draft import DraftConfig
from contracts.store import StoredSample
from drafts import moving
from drafts.batch import Batch
from drafts.moving import to_device
from drafts.objective import StepLoss
from drafts.places import anchor_places
from target.head import TargetHead

PLACES_AT_ONCE = 1024
"""Positions drafted from together in evaluation: memory does not grow with a reply's length."""

MAX_GRAPHS = 64
"""Graphs that torch.compile may make of one layer: its default, 8, is too few for EAGLE3's steps."""


class Plan(ABC):
    """What a draft has planned for a batch."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Supervised slots."""

    @property
    def normalizer(self) -> float:
        """The number by which a step's loss is divided, summed over its batches: supervised slots, or their weight."""
        return self.num_slots


class Drafted(NamedTuple):
    """Greedy draft tokens (N, K), and how likely each is accepted if those before it are, (N, K); None: unknown."""

    tokens: torch.Tensor
    confidence: torch.Tensor | None = None


class Draft(nn.Module, ABC):
    """A draft without embedding and lm_head. K is `config.num_draft_tokens`."""

    config: DraftConfig

    def initialize(self, seed: int, head: TargetHead, count_tokens: Callable[[], torch.Tensor]) -> str:  # noqa: ARG002
        """Set the initial weights; return a line to print, or "".

        A seed gives the same weights on every machine. `count_tokens()` walks the training samples and returns how
        often each token is supervised, `(V,)`.
        """
        init_weights(self, seed)
        return ""

    def layers_to_compile(self) -> list[nn.Module]:
        """Return the layers that torch.compile compiles one by one."""
        return []

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the layers, on GPUs once for batches of all lengths. `backend`: see torch.compile."""
        # Beyond this number of graphs of one function torch silently stops to compile. A method may need one for each
        # of its steps, in training and in evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        # Otherwise a size that equals another one in the first batch, such as tiles and heads, must stay equal to it.
        torch.fx.experimental._config.use_duck_shape = False
        # torch cannot trace the hand-written gradients of CPUs with sizes that it does not know.
        dynamic = moving.is_on_gpu(next(self.parameters())) or None
        for layer in self.layers_to_compile():
            layer.compile(dynamic=dynamic, backend=backend)

    def outer_modules(self) -> list[nn.Module]:
        """Return the modules whose matrices are no hidden ones: embeddings and outputs, which Muon does not fit."""
        return []

    def layers_to_shard(self) -> list[nn.Module]:
        """Return the layers that FSDP2 shards one by one; they must only be called through their forward."""
        return []

    @abstractmethod
    def plan(self, batch: Batch) -> Any:
        """Plan a batch's training step. Raises UserError with the id of a sample that has nothing to draft."""

    @abstractmethod
    def forward(self, batch: Batch, plan: Any, head: TargetHead) -> StepLoss:
        """Return the training loss of a planned batch."""

    def suppose_values(self) -> None:
        """Let `plan` work on a draft whose tensors have no values, as on torch's meta device."""

    def places(self, loss_mask: torch.Tensor) -> torch.Tensor:
        """Return the positions of a sample that this method can draft from, ascending, `(N,)`."""
        return anchor_places(loss_mask)

    @abstractmethod
    def plan_drafting(self, token_ids: torch.Tensor, loss_mask: torch.Tensor, places: torch.Tensor) -> Any:
        """Plan, on the CPU, to draft after some positions of one sample. Shapes: (T,), (T,) and (N,)."""

    @abstractmethod
    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Any, head: TargetHead
    ) -> Drafted:
        """Draft greedily after the planned positions. Shapes: (T,) and (T, n*H)."""

    @abstractmethod
    def score_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Any, head: TargetHead, temperature: float
    ) -> torch.Tensor:
        """Return the probability that the draft samples each generated token, given that it sampled those before it.

        Shapes: (T,) and (T, n*H) -> (N, K); positions after a reply's end have any value.
        """

    @torch.inference_mode()
    def score(self, sample: StoredSample, head: TargetHead, temperature: float) -> torch.Tensor:
        """Return `score_planned` after every position that serving can draft from: (T, K) on the CPU, else 0."""
        scores = torch.zeros((sample.num_tokens, self.config.num_draft_tokens))
        for places, ids, aux, plan in self._by_places(sample, head.lm_head.device):
            scores[places] = self.score_planned(ids, aux, plan, head, temperature).float().cpu()
        return scores

    def _by_places(
        self, sample: StoredSample, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]]:
        """Yield positions that serving can draft from, with tokens, captured states and their plan on the device."""
        ids = sample.input_ids.long()
        token_ids, aux = to_device((ids, sample.aux_hidden_states), device)
        for places in self.places(sample.loss_mask).split(PLACES_AT_ONCE):
            yield places, token_ids, aux, to_device(self.plan_drafting(ids, sample.loss_mask, places), device)

    @torch.inference_mode()
    def draft(self, sample: StoredSample, head: TargetHead) -> Drafted:
        """Draft greedily after every position that serving can draft from.

        Shapes: (T, K) on the CPU, the tokens -1 at all other positions.
        """
        tokens = torch.full((sample.num_tokens, self.config.num_draft_tokens), -1)
        confidence = None
        for places, ids, aux, plan in self._by_places(sample, head.lm_head.device):
            found = self.draft_planned(ids, aux, plan, head)
            tokens[places] = found.tokens.cpu()
            if found.confidence is not None:
                confidence = tokens.new_zeros(tokens.shape, dtype=torch.float32) if confidence is None else confidence
                confidence[places] = found.confidence.float().cpu()
        return Drafted(tokens, confidence)

    @abstractmethod
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        """Return the tensors that `bench parity` compares: draft_logits and the method's own.

        Shapes: draft_logits (K, V) after token `start`; -inf marks tokens outside the draft's vocabulary. Names: see
        `contracts.trace.Trace`.
        """

    def mask_taps(self, head: TargetHead) -> dict[str, torch.Tensor]:
        """Return the mask token and its embedding, for `bench parity`."""
        mask = self.config.mask_token_id or 0
        return {"mask_token": torch.tensor(mask), "mask_embedding": head.embedding[mask].float().cpu()}


def as_input(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return stored states in the dtype that a product with `weight` needs; autocast casts them itself."""
    kind = states.device.type
    is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
    return states if is_cast else states.to(weight.dtype)


def init_weights(model: nn.Module, seed: int) -> None:
    """Initialize matrices from N(0, 0.02^2) and norms with ones; a seed gives the same weights on every machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)

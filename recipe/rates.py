"""Tokens/s of a target: measured by an earlier run, stated in the recipe, or estimated from the hardware.

Estimates are rooflines (Williams et al., doi 10.1145/1498765.1498785). A prefill takes 2 operations a token and active
parameter. A decoding step reads the weights and the KV cache of the sequences in flight, or takes their operations if
that is longer; its sequences fill the memory beside the weights, at most synth.max_concurrency on all replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from recipe.figures import Figure
from recipe.hardware import Node
from recipe.recipe import Recipe
from target.size import Size, find_size, weights_bytes
from target.target import Target

USED_MEMORY = 0.9
"""Share of a GPU's memory for weights and KV cache, near vLLM's default."""
BANDWIDTH_SHARE = 0.5
PEAK_SHARE = 0.4
"""Shares of the peaks of memory bandwidth and of operations that an engine reaches: assumed, not measured here."""


@dataclass(frozen=True)
class Fleet:
    """Nodes of one kind, and the target on them. `weights` in bytes; `replica_gpus`: that hold the target once."""

    hardware: str
    node: Node
    nodes: int
    size: Size
    weights: float
    weights_source: str
    replica_gpus: int

    @classmethod
    def of(cls, recipe: Recipe, target: Target, hardware: str, node: Node, nodes: int) -> Fleet:
        """Place the target: on `tensor-parallel-size` GPUs if they hold it, else on more. Raises UserError: too few."""
        weights, source = _weights(recipe, target)
        room = USED_MEMORY * node.gpu_memory_gb * 1e9
        gpus = min(int(recipe.serve.args.get("tensor-parallel-size", 1)), node.num_gpus)
        while weights > gpus * room and gpus < node.num_gpus:
            gpus = min(2 * gpus, node.num_gpus)
        if weights > gpus * room:
            gpus = node.num_gpus * ceil(weights / (node.num_gpus * room))
        if gpus > nodes * node.num_gpus:
            raise UserError(
                f"{nodes} x {hardware}",
                found=f"{nodes * node.memory_gb} GB of GPU memory",
                expected=f"{weights / USED_MEMORY / 1e9:.0f} GB for the target ({source})",
                fix=f"Take {gpus // node.num_gpus} nodes, GPUs with more memory, or a smaller serve.variant.",
            )
        return cls(hardware, node, nodes, find_size(target), weights, source, gpus)

    @property
    def replicas(self) -> int:
        return self.nodes * self.node.num_gpus // self.replica_gpus

    def with_nodes(self, nodes: int) -> Fleet:
        return replace(self, nodes=nodes)

    def prefill_rate(self) -> Figure:
        """Estimate the tokens/s that all replicas prefill."""
        flops = self.replicas * self.replica_gpus * self.node.gpu_tflops * 1e12 * PEAK_SHARE
        how = (
            f"{self.replicas} x {self.replica_gpus} GPUs x {self.node.gpu_tflops} TFLOP/s x {PEAK_SHARE:g} / (2 x "
            f"{self.size.active / 1e9:.1f}B active parameters, {self.size.source})"
        )
        return Figure(flops / (2 * self.size.active), "estimated", how)

    def decode_rate(self, sequences: float, context: float) -> Figure:
        """Estimate the tokens/s of one replica that decodes `sequences` at a time, each after `context` tokens."""
        gpus, node = self.replica_gpus, self.node
        read = min(self.weights, sequences * 2 * self.size.active) + sequences * context * self.size.kv_bytes
        reading = read / (gpus * node.gpu_tb_per_s * 1e12 * BANDWIDTH_SHARE)
        computing = 2 * self.size.active * sequences / (gpus * node.gpu_tflops * 1e12 * PEAK_SHARE)
        seconds = max(reading, computing)
        how = (
            f"{sequences:.0f} sequences / {1000 * seconds:.1f} ms, in which {gpus} GPUs "
            + (f"read {read / 1e9:.0f} GB at {BANDWIDTH_SHARE:.0%} of" if reading > computing else "compute at 40% of")
            + f" {gpus} x {node.gpu_tb_per_s if reading > computing else node.gpu_tflops:g} "
            + ("TB/s" if reading > computing else "TFLOP/s")
        )
        return Figure(sequences / seconds, "estimated", how)

    def generation_rate(self, mean_tokens: int, most: int) -> Figure:
        """Estimate the tokens/s that all replicas generate, with at most `most` conversations in flight."""
        free = USED_MEMORY * self.replica_gpus * self.node.gpu_memory_gb * 1e9 - self.weights
        sequences = max(1.0, min(free / (mean_tokens * self.size.kv_bytes), most / self.replicas))
        one = self.decode_rate(sequences, mean_tokens / 2)
        return Figure(one.value * self.replicas, "estimated", f"{self.replicas} replicas x ({one.how})")


def _weights(recipe: Recipe, target: Target) -> tuple[float, str]:
    """Return the bytes that a replica's weights take, and where the number is from."""
    serve = recipe.serve
    if serve.variant is not None and serve.variant in serve.variants:
        return serve.variants[serve.variant].memory_gb * 1e9, f"serve.variants.{serve.variant}.memory_gb"
    facts = target.facts
    if not target.has_weights and facts is not None and facts.num_parameters is not None:
        return 2 * facts.num_parameters, "target.facts.num_parameters in bfloat16"
    found, source = weights_bytes(target)
    return float(found), source


@dataclass(frozen=True)
class Measured:
    """Tokens/s of one node in an earlier run, as far as its stages have finished. `run`: its training, for the MFU."""

    synth: Figure | None = None
    dump: Figure | None = None
    run: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> Measured:
        """Read a run on one node with the layout of recipes/stages.sh. Raises UserError if no stage has finished."""
        run = folder / "draft" if (folder / "draft/metrics.jsonl").exists() else None
        found = cls(_rate_of(folder / "synth/train/run.json"), _rate_of(folder / "store/train/run.json"), run)
        if found == cls():
            raise UserError(
                folder,
                found="no finished synth/train, store/train or draft",
                expected="the folder of an earlier run.sh",
                fix="Correct the path, or state rates with --set plan.synth_tokens_per_s=... .",
            )
        return found


def _rate_of(path: Path) -> Figure | None:
    """Return the tokens/s of a finished stage, its start included."""
    if not path.exists():
        return None
    state: dict[str, Any] = read_json(path, "a run's state")
    if not state["complete"] or not state["seconds"]:
        return None
    return Figure(state["summary"]["tokens"] / state["seconds"], "measured", f"tokens / seconds in {path}")

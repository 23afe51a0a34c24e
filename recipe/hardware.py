"""GPU nodes: number of GPUs, memory, speed, and whether a target fits.

Memory is in GB (1e9 bytes), its bandwidth in TB/s, speed in TFLOP/s of dense bf16 products, all as vendors state them.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError


@dataclass(frozen=True)
class Node:
    num_gpus: int
    gpu_memory_gb: int
    gpu_tflops: int
    gpu_tb_per_s: float
    rocm: bool = False

    @property
    def memory_gb(self) -> int:
        """Memory of all GPUs."""
        return self.num_gpus * self.gpu_memory_gb


NODES = {
    "h100": Node(8, 80, 989, 3.35),
    "h200": Node(8, 141, 989, 4.8),
    "b200": Node(8, 180, 2250, 8.0),
    "b300": Node(8, 268, 2250, 8.0),
    "gb200": Node(4, 192, 2500, 8.0),
    "gb300": Node(4, 288, 2500, 8.0),
    "mi355x": Node(8, 288, 2300, 8.0, rocm=True),
}


def find_node(name: str, option: str = "--hardware") -> Node:
    """Look up a node by its name. Raises UserError for an unknown name."""
    if name not in NODES:
        raise UserError(option, found=name, expected=f"one of {', '.join(NODES)}", fix="Correct it.")
    return NODES[name]


def check_fit(variant: str, memory_gb: float, hardware: str, node: Node, num_gpus: int) -> None:
    """Raise UserError if the node lacks `num_gpus` GPUs, or they lack the variant's `memory_gb`."""
    if num_gpus > node.num_gpus:
        raise UserError(
            "tensor-parallel-size",
            found=f"{num_gpus} GPUs",
            expected=f"at most the {node.num_gpus} of {hardware}",
            fix="Lower it, or serve over several nodes with vLLM's own flags.",
        )
    if memory_gb > num_gpus * node.gpu_memory_gb:
        raise UserError(
            f"--variant {variant} --hardware {hardware}",
            found=f"{num_gpus} GPUs with {num_gpus * node.gpu_memory_gb} GB",
            expected=f"{memory_gb:g} GB for the target",
            fix="Choose a smaller variant, more GPUs (tensor-parallel-size), or nodes with more memory.",
        )

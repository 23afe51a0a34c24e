"""One tensor-parallel rank of a model whose layers defer their all-reduce: `deferring_ranks.py RANK FOLDER`.

Model, decoder layer and fused norm are those of vLLM's NVIDIA MiniMax-M3 (`forward` of MiniMaxM3Model and of
MiniMaxM3DecoderLayer); attention, FFN and norms are small stand-ins that run on a CPU. FOLDER/weights holds the weights
of one process. Writes FOLDER/rank<RANK>.safetensors: the captured states and the model's output in each of CASES.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from serve.vllm_main import answer_for_vllm_version

RANKS, NUM_LAYERS, HIDDEN, INNER, TOKENS, EPS = 2, 3, 16, 8, 5, 1e-6
CASES = {"without": "0.32.0", "unchecked": "99.0.0", "with": "0.32.0"}
"""Whether our plugin is registered, and vLLM's release."""


class Norm(nn.Module):
    """A Gemma RMSNorm with M3's interface: with a residual it returns (normed, new residual)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, EPS

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        summed = x if residual is None else x + residual
        normed = functional.rms_norm(summed, (HIDDEN,), 1.0 + self.weight, EPS)
        return normed if residual is None else (normed, summed)


class Part(nn.Module):
    """A rank's part of a product whose all-reduce is left to the caller."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, rank: int, ranks: int) -> None:
        super().__init__()
        size = INNER // ranks
        self.up, self.down = up[rank * size : (rank + 1) * size], down[:, rank * size : (rank + 1) * size]
        self.down_proj = types.SimpleNamespace(reduce_results=False)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(functional.linear(hidden_states, self.up).tanh(), self.down)


def make_weights(folder: Path) -> None:
    torch.manual_seed(0)
    names = [f"{i}.{part}.{side}" for i in range(NUM_LAYERS) for part in ("attn", "mlp") for side in ("up", "down")]
    weights = {name: torch.randn((INNER, HIDDEN) if name.endswith("up") else (HIDDEN, INNER)) for name in names}
    weights |= {f"{i}.{name}": torch.randn(HIDDEN) / 4 for i in range(NUM_LAYERS) for name in ("norm1", "norm2")}
    save_file({**weights, "norm": torch.randn(HIDDEN) / 4, "embeds": torch.randn(TOKENS, HIDDEN)}, folder / "weights")


def build(m3: types.ModuleType, weights: dict[str, torch.Tensor], rank: int, ranks: int) -> nn.Module:
    """Return vLLM's model around stand-ins, wired as its `__init__` does."""
    model = m3.MiniMaxM3Model.__new__(m3.MiniMaxM3Model)
    nn.Module.__init__(model)
    model.layers = nn.ModuleList()
    for i in range(NUM_LAYERS):
        layer = m3.MiniMaxM3DecoderLayer.__new__(m3.MiniMaxM3DecoderLayer)
        nn.Module.__init__(layer)
        layer.is_moe_layer = False
        layer.self_attn, layer.mlp = (
            Part(weights[f"{i}.{part}.up"], weights[f"{i}.{part}.down"], rank, ranks) for part in ("attn", "mlp")
        )
        layer.input_layernorm, layer.post_attention_layernorm = Norm(weights[f"{i}.norm1"]), Norm(weights[f"{i}.norm2"])
        layer.fuse_input_allreduce = i > 0
        model.layers.append(layer)
    model.norm, model.start_layer, model.end_layer = Norm(weights["norm"]), 0, NUM_LAYERS
    model.fuse_final_norm_allreduce = True
    assert all(layer.ffn_all_reduce_deferred for layer in model.layers)
    return model


def import_m3() -> types.ModuleType:
    """Import M3's module without torchvision, which its image processor asks for."""
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.transforms"].InterpolationMode = type("InterpolationMode", (), {})
    import vllm.models.minimax_m3.nvidia.model as m3

    return m3


def main(rank: int, folder: Path) -> None:
    answer_for_vllm_version()
    os.environ["VLLM_DIST_IDENT"] = str(rank)  # ranks of different names communicate through gloo, not shared memory
    import vllm
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    import serve.vllm_plugins.deferred_reduction

    m3, weights, found = import_m3(), load_file(folder / "weights"), {}
    with set_current_vllm_config(VllmConfig()):
        address = f"file://{folder / 'rendezvous'}"
        parallel_state.init_distributed_environment(RANKS, rank, address, rank, backend="gloo")
        parallel_state.initialize_model_parallel(RANKS)
        for case, release in CASES.items():
            vllm.__version__ = release
            if case != "without":
                serve.vllm_plugins.deferred_reduction.register()
            model = build(m3, weights, rank, RANKS)
            model._set_aux_hidden_state_layers((0, 1, NUM_LAYERS))  # the embedding, the first layer, the final state
            output, captured = model(None, torch.arange(TOKENS), None, weights["embeds"].clone())
            found |= {f"{case}.captured": torch.stack(captured), f"{case}.output": output}
    save_file(found, folder / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

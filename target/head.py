"""Read a target's embedding, lm_head and final norm from its safetensors. No other weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch.nn import functional

from common.errors import UserError
from common.vml import settle_vector_functions
from target.target import Target

# The names of different model families.
EMBEDDING = ("model.embed_tokens.weight", "embed_in.weight", "wte.weight")
LM_HEAD = ("lm_head.weight", "embed_out.weight")
FINAL_NORM = ("model.norm.weight", "final_layernorm.weight", "final_layer_norm.weight", "ln_f.weight")


@dataclass(frozen=True)
class TargetHead:
    """Shapes: embedding and lm_head (V, H), norm and its bias (H,). `norm_kind`: see target/final_norm.py.

    Logits are multiplied by `scale`, then `softcap * tanh(logits / softcap)` is applied, if the target has them.
    """

    embedding: torch.Tensor
    lm_head: torch.Tensor
    norm: torch.Tensor
    norm_kind: str
    eps: float
    norm_bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TargetHead:
        """Return the head on a device, by default in fp32 on CPUs and in bf16 elsewhere. The norm stays in fp32."""
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        lm_head = self.lm_head.to(device, dtype)
        embedding = lm_head if self.embedding is self.lm_head else self.embedding.to(device, dtype)
        bias = None if self.norm_bias is None else self.norm_bias.to(device)
        return replace(self, embedding=embedding, lm_head=lm_head, norm=self.norm.to(device), norm_bias=bias)

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm to `(..., H)`, in fp32."""
        shape = (hidden.shape[-1],)
        weight = 1.0 + self.norm if self.norm_kind in ("gemma", "layer1p") else self.norm
        if self.norm_kind in ("layer", "layer1p"):
            return functional.layer_norm(hidden.float(), shape, weight, self.norm_bias, self.eps)
        return functional.rms_norm(hidden.float(), shape, weight, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the target's logits `(..., V)` for final states `(..., H)` before the final norm, in fp32."""
        logits = logits_of(self.normalize(hidden).to(self.lm_head.dtype), self.lm_head)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def logits_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x @ weight.T` in fp32, for inputs of one dtype. Shapes: x (..., H), weight (V, H) -> (..., V).

    Softmax and argmax need more digits than bf16 has. On GPUs the product itself returns the sums in fp32.
    """
    if x.device.type == "cuda" and x.dtype != torch.float32:
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32).view(*x.shape[:-1], -1)
    return functional.linear(x, weight).float()


def read_head(target: Target) -> TargetHead:
    """Read the three tensors under any prefix (such as `language_model.`); lm_head may be tied.

    Training, evaluation and verification call this before they compute, so it settles MKL first (common/vml.py).
    Raises UserError if a tensor is missing, or if the lm_head has a bias, which vLLM does not add to a draft's logits.
    """
    settle_vector_functions()
    files, config = _files_by_tensor(target), target.config
    embedding = _read(target, files, EMBEDDING)
    untied = _find(files, LM_HEAD)
    if any(name.removesuffix("weight") + "bias" in files for name in untied):
        raise UserError(
            target.path, found="an lm_head with a bias", expected="one without", fix="Such targets are not supported."
        )
    norm_bias = [name.removesuffix("weight") + "bias" for name in _find(files, FINAL_NORM)]
    return TargetHead(
        embedding=embedding,
        lm_head=embedding if config.get("tie_word_embeddings") or not untied else _read(target, files, LM_HEAD),
        norm=_read(target, files, FINAL_NORM),
        norm_kind=target.final_norm,
        eps=target.norm_eps,
        norm_bias=_read(target, files, tuple(norm_bias)) if norm_bias[0] in files else None,
        scale=float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0),
        softcap=config.get("final_logit_softcapping"),
    )


def _files_by_tensor(target: Target) -> dict[str, str]:
    index = target.path / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text())["weight_map"])
    found = {}
    for path in sorted(target.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    return found


def _find(files: dict[str, str], suffixes: tuple[str, ...]) -> list[str]:
    """Return the names that end in the first suffix with any match."""
    for suffix in suffixes:
        if found := [name for name in files if name == suffix or name.endswith("." + suffix)]:
            return found
    return []


def _read(target: Target, files: dict[str, str], suffixes: tuple[str, ...]) -> torch.Tensor:
    names = _find(files, suffixes)
    if len(names) != 1:
        raise UserError(
            target.path,
            found=f"{len(names)} tensors that end in {' or '.join(suffixes)} ({', '.join(names) or 'none'})",
            expected="one",
            fix="Check the target's weights; this architecture may keep them under other names.",
        )
    with safe_open(target.path / files[names[0]], framework="pt") as file:
        return file.get_tensor(names[0]).float()

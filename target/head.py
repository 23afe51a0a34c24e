"""Read a target's embedding, lm_head and final norm from its safetensors. No other weight is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional

from common.errors import UserError
from common.vml import settle_vector_functions
from target.quantized import PLAIN, weight_of
from target.target import Target

# The names of different model families.
EMBEDDING = ("model.embed_tokens", "language_model.embed_tokens", "embed_in", "wte")
LM_HEAD = ("lm_head", "embed_out")
FINAL_NORM = ("model.norm", "language_model.norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class TargetHead:
    """Shapes: embedding and lm_head (V, H), norm and its bias (H,). `norm_kind`: see target/final_norm.py.

    The target's logits are multiplied by `scale`, then `softcap * tanh(logits / softcap)` is applied, if it has them.
    Neither is part of a draft's logits, nor the target's factor of embeddings (Gemma, Granite) of a draft's inputs:
    vLLM shares the weights of `embed_tokens` and `lm_head` alone with DFlash and EAGLE3.
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

    def of_tokens(self, tokens: torch.Tensor) -> TargetHead:
        """Return a head whose logits are those of `tokens (n,)` alone."""
        return replace(self, lm_head=self.lm_head.index_select(0, tokens))

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm to `(..., H)`, in fp32."""
        shape = (hidden.shape[-1],)
        weight = 1.0 + self.norm if self.norm_kind in ("gemma", "layer1p") else self.norm
        if self.norm_kind in ("layer", "layer1p"):
            return functional.layer_norm(hidden.float(), shape, weight, self.norm_bias, self.eps)
        return functional.rms_norm(hidden.float(), shape, weight, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the target's logits `(..., V)` for final states `(..., H)` before the final norm, in fp32."""
        return self.finish(logits_of(self.normalize(hidden).to(self.lm_head.dtype), self.lm_head))

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the target's logits for products with its lm_head: scaled and soft-capped, if it does that."""
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
    """Read the three tensors under any prefix (such as `language_model.`), dequantized (target/quantized.py).

    Training, evaluation and verification call this before they compute, so it settles MKL first (common/vml.py).
    Raises UserError if a module is missing, is quantized in a way that is not read, or if the lm_head has a bias, which
    vLLM does not add to a draft's logits.
    """
    settle_vector_functions()
    files = _files_by_tensor(target)
    embedding = _read(target, files, EMBEDDING)
    norm = _find_one(target, files, FINAL_NORM)
    return TargetHead(
        embedding=embedding,
        lm_head=_read_lm_head(target, files, embedding),
        norm=_read(target, files, FINAL_NORM),
        norm_kind=target.final_norm,
        eps=target.norm_eps,
        norm_bias=_tensor(target, files, f"{norm}.bias").float() if f"{norm}.bias" in files else None,
        scale=find_logit_scale(target.config),
        softcap=target.config.get("final_logit_softcapping"),
    )


def _read_lm_head(target: Target, files: Mapping[str, str], embedding: torch.Tensor) -> torch.Tensor:
    """Return the lm_head; if there is none, the embedding, provided that the config ties them.

    A weight in the checkpoint is used whatever the config says, as vLLM (`maybe_untie_word_embeddings`) and
    transformers do.
    """
    found = _find(files, LM_HEAD)
    if not any(f"{name}.weight" in files for name in found) and target.is_tied:
        return embedding
    if not found:
        raise UserError(
            target.path,
            found=f"no {' or '.join(LM_HEAD)}, and a config that does not tie it to the embedding",
            expected="a weight, or tie_word_embeddings: true",
            fix="Check that all files of the weights are here, or set tie_word_embeddings in config.json.",
        )
    if any(f"{name}.bias" in files for name in found):
        raise UserError(
            target.path, found="an lm_head with a bias", expected="one without", fix="Such targets are not supported."
        )
    lm_head = _read(target, files, LM_HEAD)
    return embedding if torch.equal(lm_head, embedding) else lm_head  # one copy on the device


def read_norms(target: Target, rows: range) -> torch.Tensor | None:
    """Return the norms of these rows of the lm_head `(R,)` in fp32, reading no others.

    None for a quantized lm_head, or if its file is not here.
    """
    files = _files_by_tensor(target)
    found = [f"{name}.weight" for name in (*_find(files, LM_HEAD), *_find(files, EMBEDDING))]
    name = next((name for name in found if name in files), None)
    if name is None or not (target.path / files[name]).exists():
        return None
    with safe_open(target.path / files[name], framework="pt") as file:
        part = file.get_slice(name)[rows.start : rows.stop]
    return part.float().norm(dim=1) if part.dtype in PLAIN else None


def find_logit_scale(config: Mapping[str, Any]) -> float:
    """Return the factor of the logits that a text model's config describes.

    Source: where vLLM's and transformers' models multiply or divide logits, or the states before lm_head.
    """
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, MuseGlimmer
        scale *= float(config.get(key) or 1.0)
    if config.get("dim_model_base"):  # MiniCPM
        scale *= config["dim_model_base"] / config["hidden_size"]
    if factor := config.get("logits_scaling"):  # Granite divides, HyperCLOVA X multiplies
        scale *= factor if str(config.get("model_type")).startswith("hyperclovax") else 1.0 / factor
    return scale


def _files_by_tensor(target: Target) -> dict[str, str]:
    index = target.path / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text())["weight_map"])
    found = {}
    for path in sorted(target.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    return found


def _find(files: Mapping[str, str], suffixes: tuple[str, ...]) -> list[str]:
    """Return the modules with tensors whose names end in the first suffix with any match."""
    for suffix in suffixes:
        pattern = re.compile(rf"((?:.*\.)?{re.escape(suffix)})\.")
        if found := {match[1] for name in files if (match := pattern.match(name))}:
            return sorted(found)
    return []


def _find_one(target: Target, files: Mapping[str, str], suffixes: tuple[str, ...]) -> str:
    names = _find(files, suffixes)
    if len(names) != 1:
        raise UserError(
            target.path,
            found=f"{len(names)} modules that end in {' or '.join(suffixes)} ({', '.join(names) or 'none'})",
            expected="one",
            fix="Check the target's weights; this architecture may keep them under other names.",
        )
    return names[0]


def _read(target: Target, files: Mapping[str, str], suffixes: tuple[str, ...]) -> torch.Tensor:
    """Return the weight of the module with one of these names, in fp32."""
    module = _find_one(target, files, suffixes)
    names = [name for name in files if name.startswith(f"{module}.") and name != f"{module}.bias"]
    parts = {name.removeprefix(f"{module}."): _tensor(target, files, name) for name in names}
    return weight_of(parts, target.config, f"{target.path}: {module}")


def _tensor(target: Target, files: Mapping[str, str], name: str) -> torch.Tensor:
    with safe_open(target.path / files[name], framework="pt") as file:
        return file.get_tensor(name)

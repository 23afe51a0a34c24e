"""The few weights of a target that stages need: embedding, lm_head and final norm, read straight from safetensors.

Nothing else of the target is loaded, so that a terabyte of weights costs three tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch.nn import functional

from contracts.errors import UserError
from contracts.target import Target
from contracts.vml import settle_vector_functions

# How the families name them; all but the first are targets with LayerNorms.
EMBEDDING = ("model.embed_tokens.weight", "embed_in.weight", "wte.weight")
LM_HEAD = ("lm_head.weight", "embed_out.weight")
FINAL_NORM = ("model.norm.weight", "final_layernorm.weight", "final_layer_norm.weight", "ln_f.weight")


@dataclass(frozen=True)
class TargetHead:
    """Shapes: embedding and lm_head (V, H), norm and its bias (H,), all fp32. `norm_kind` as Target.final_norm.

    Logits are multiplied by `scale` and bent by `softcap * tanh(logits / softcap)`, where the target does so.
    """

    embedding: torch.Tensor
    lm_head: torch.Tensor
    norm: torch.Tensor
    norm_kind: str
    eps: float
    norm_bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device) -> TargetHead:
        """The head on a device."""
        lm_head = self.lm_head.to(device)
        embedding = lm_head if self.embedding is self.lm_head else self.embedding.to(device)
        bias = None if self.norm_bias is None else self.norm_bias.to(device)
        return replace(self, embedding=embedding, lm_head=lm_head, norm=self.norm.to(device), norm_bias=bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., H)` final states before the final norm to the target's logits `(..., V)`, in fp32."""
        shape = (hidden.shape[-1],)
        if self.norm_kind == "layer":
            normed = functional.layer_norm(hidden.float(), shape, self.norm, self.norm_bias, self.eps)
        else:
            weight = 1.0 + self.norm if self.norm_kind == "gemma" else self.norm
            normed = functional.rms_norm(hidden.float(), shape, weight, self.eps)
        logits = functional.linear(normed, self.lm_head)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def kept_by(q: torch.Tensor, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """Which tokens `(t, V)` a sampler with top_k and top_p can draw from probabilities `q`, top_k first."""
    ordered, order = q.sort(-1, descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        kept[:, top_k:] = False
    if top_p is not None:
        mass = (ordered * kept).cumsum(-1) / (ordered * kept).sum(-1, keepdim=True)
        kept &= torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1) < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)


def sampling_probabilities(
    logits: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None
) -> torch.Tensor:
    """What a sampler draws from, `(t, V)`: one-hot at the argmax for temperature 0."""
    if temperature == 0.0:
        return functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    q = (logits / temperature).softmax(-1)
    if top_k or top_p is not None:
        q = q * kept_by(q, top_p, top_k)
        q = q / q.sum(-1, keepdim=True)
    return q


def read_head(target: Target) -> TargetHead:
    """Read the three tensors, whatever prefix they have (`language_model.` and the like); lm_head may be tied.

    Whatever trains a draft, follows one, or proves a store comes here before it computes: see contracts/vml.py.
    Raises UserError when one is missing, or when the lm_head has a bias, which no draft's server would add.
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
    """The tensors' names that end in the first of the suffixes which any of them ends in."""
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

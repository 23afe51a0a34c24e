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

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class TargetHead:
    """Shapes: embedding and lm_head (V, H), norm (H,), all fp32. `norm_kind` as Target.final_norm."""

    embedding: torch.Tensor
    lm_head: torch.Tensor
    norm: torch.Tensor
    norm_kind: str
    eps: float

    def to(self, device: torch.device) -> TargetHead:
        """The head on a device."""
        lm_head = self.lm_head.to(device)
        embedding = lm_head if self.embedding is self.lm_head else self.embedding.to(device)
        return replace(self, embedding=embedding, lm_head=lm_head, norm=self.norm.to(device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., H)` final states before the final norm to the target's logits `(..., V)`, in fp32."""
        weight = 1.0 + self.norm if self.norm_kind == "gemma" else self.norm
        normed = functional.rms_norm(hidden.float(), (hidden.shape[-1],), weight, self.eps)
        return functional.linear(normed, self.lm_head)


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

    Raises UserError when one is missing.
    """
    files = _files_by_tensor(target)
    embedding = _read(target, files, EMBEDDING)
    tied = target.config.get("tie_word_embeddings") or not any(name.endswith(LM_HEAD) for name in files)
    return TargetHead(
        embedding=embedding,
        lm_head=embedding if tied else _read(target, files, LM_HEAD),
        norm=_read(target, files, FINAL_NORM),
        norm_kind=target.final_norm,
        eps=target.rms_norm_eps,
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


def _read(target: Target, files: dict[str, str], suffix: str) -> torch.Tensor:
    names = [name for name in files if name == suffix or name.endswith("." + suffix)]
    if len(names) != 1:
        raise UserError(
            target.path,
            found=f"{len(names)} tensors that end in {suffix} ({', '.join(names) or 'none'})",
            expected="one",
            fix="Check the target's weights; this architecture may keep them under other names.",
        )
    with safe_open(target.path / files[names[0]], framework="pt") as file:
        return file.get_tensor(names[0]).float()

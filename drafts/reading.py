"""Read drafts of any layout, ours or another tool's: the inverse of `drafts/export.py`.

A method's `read_published` says what its layouts mean; the functions here read what transformer drafts share. Whatever
a layout has and our module cannot compute is refused by name: dropped silently, it would change the draft's outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from contracts.draft import Yarn
from target.layers import can_be_captured

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = re.compile(r"^(model\.|draft_model\.)+")
SHARED = ("embed_tokens.weight", "lm_head.weight")
"""The target's weights, of which some layouts keep a copy."""
UNUSED = re.compile(r"rotary_emb\.inv_freq$|^verifier_|^medusa_heads?\.")
"""Tensors that a draft's outputs do not depend on."""
EXTRAS = {
    r"^fc_norm\.": "EAGLE 3.1's norms before fc",
    r"^input_norm\.": "a norm before fc (norm_before_fc)",
    r"[qk]_norm\.": "norms of queries and keys (Qwen3)",
    r"kv_a_proj|q_a_proj": "multi-head latent attention (kimik2)",
    r"mask_hidden": "P-EAGLE's mask vector",
    r"mask_embedding": "a mask token's own embedding",
    r"markov|confidence": "DSpark's heads",
    r"_conv\.|candidate_selector|lilicorr": "the additions of DFlash2 or LiLiCorr",
    r"prefix_gru|embed_proj": "Domino's head",
    r"^encoder\.": "an encoder of the captured layers",
    r"sink": "attention sinks",
    r"_scale(_inv)?$|_scale_\d$": "quantized weights",
    r"\.bias$": "biases",
    r"d2t|t2d": "a reduced vocabulary",
    r"layers\.\d": "more layers",
}
"""What tensors that a module lacks mean; the first pattern found in a name counts."""


@dataclass(frozen=True)
class DraftFolder:
    """A draft's folder: config.json, and the tensors by their names in the files.

    `num_target_layers`: layers of the target that the draft is read for; some layouts leave out default layer ids.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    num_target_layers: int

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def layer(self) -> dict[str, Any]:
        """The config with speculators' nested dimensions at the top level."""
        return {**self.config, **(self.config.get("transformer_layer_config") or {})}

    def refuse(self, key: str, found: object, expected: str) -> UserError:
        """Return the error for a value of config.json that the method's module does not implement."""
        return UserError(
            f"{self.config_path} ({key})",
            found=str(found),
            expected=expected,
            fix="Drafts of this kind can be served, but neither evaluated nor trained here.",
        )


@dataclass(frozen=True)
class LayerIds:
    """Captured layers, 0-based, and a sentence that says how the folder counts them."""

    ids: list[int]
    counted: str


@dataclass(frozen=True)
class Published:
    """A draft that was read, in our terms.

    `weights`: tensors by our names; `renamed`: the folder's names of those that have another one. `facts`: values of
    the method's config fields. `shared`: copies of the target's weights, by name; they must equal the target's.
    `unused`: the folder's other tensors. `path`: the folder of the weights. `is_checkpoint`: of a training run of ours.
    """

    path: Path
    layers: LayerIds
    facts: dict[str, Any]
    weights: dict[str, Tensor]
    renamed: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    target_fingerprint: str | None = None
    is_checkpoint: bool = False


def vllm_ids(key: str, ids: list[int]) -> LayerIds:
    """Translate layer ids that count as vLLM does."""
    return LayerIds([i - 1 for i in ids], f"{key} {ids} counts as vLLM does: k is the output of layer k-1")


def zero_based(key: str, ids: list[int]) -> LayerIds:
    """Return layer ids that count as ours do."""
    return LayerIds(list(ids), f"{key} {ids} is 0-based: k is the output of layer k")


def read_transformer(
    folder: DraftFolder, layers: LayerIds, rename: Callable[[str], str] = str, own: Mapping[str, Any] | None = None
) -> Published:
    """Return a transformer draft; `rename` gives our names, `own` the facts that only the method can read."""
    weights: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    renamed, unused = dict[str, str](), list[str]()
    for name, tensor in folder.tensors.items():
        ours = rename(PREFIX.sub("", name))
        if UNUSED.search(ours):
            unused.append(name)
        elif ours in SHARED:
            shared[ours] = tensor
        else:
            weights[ours] = tensor
        if ours != name and ours in weights:
            renamed[ours] = name
    facts = {**_dimensions(folder), **(own or {})}
    _check_inputs(folder, weights, layers, facts["hidden_size"])
    return Published(folder.path, layers, facts, weights, renamed, shared, unused)


def _dimensions(folder: DraftFolder) -> dict[str, Any]:
    """Return dimensions and rope. Raises UserError for what our transformer layers lack."""
    layer = folder.layer
    for key, wanted in {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
    }.items():  # fmt: skip
        if layer.get(key, wanted) not in (wanted, None):
            raise folder.refuse(key, layer[key], str(wanted))
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if key not in layer:
            raise folder.refuse(key, "none", "a number")
    if layer.get("quantization_config"):
        raise folder.refuse("quantization_config", "quantized weights", "bf16, fp16 or fp32")
    heads = layer["num_attention_heads"]
    facts = {
        "hidden_size": layer["hidden_size"],
        "vocab_size": layer["vocab_size"],
        "num_layers": layer["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": layer.get("num_key_value_heads") or heads,
        "head_dim": layer.get("head_dim") or layer["hidden_size"] // heads,
        "intermediate_size": layer["intermediate_size"],
        **_rope(folder, layer),
    }
    named = ("num_target_layers", "rms_norm_eps", "max_position_embeddings")
    return {**facts, **{key: layer[key] for key in named if layer.get(key) is not None}}


def _rope(folder: DraftFolder, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta, if it is there, and YaRN. Raises UserError for any other rope."""
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    theta = rope.get("rope_theta", layer.get("rope_theta"))
    found = {} if theta is None else {"rope_theta": float(theta)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {**found, "yarn": None}
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    defaults = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    more = {key: value for key, value in rope.items() if key not in known and value not in (None, defaults.get(key))}
    if kind != "yarn" or more:
        raise folder.refuse("rope_parameters", f"{kind} {more or ''}".strip(), "plain rope, or YaRN with its defaults")
    length = rope.get("original_max_position_embeddings")
    if length is None:
        raise folder.refuse("rope_parameters", "YaRN", "YaRN with original_max_position_embeddings")
    return {**found, "yarn": Yarn(factor=rope["factor"], original_max_position_embeddings=length)}


def _check_inputs(folder: DraftFolder, weights: Mapping[str, Tensor], layers: LayerIds, hidden_size: int) -> None:
    """Raise UserError if fc does not take as many layers as the config lists, or takes the final state."""
    columns = weights["fc.weight"].shape[1] if "fc.weight" in weights else 0
    if columns != len(layers.ids) * hidden_size:
        raise UserError(
            folder.config_path,
            found=f"{len(layers.ids)} layers ({layers.counted})",
            expected=f"{columns / hidden_size:g}, from the {columns} columns of fc.weight",
            fix="Correct the layer ids in config.json; some converters leave out the last layer's.",
        )
    if not can_be_captured(layers.ids, folder.num_target_layers):
        raise UserError(
            folder.config_path,
            found=f"layers {layers.ids} ({layers.counted})",
            expected=f"sorted, unique layers from 0 to {folder.num_target_layers - 2}, those that a store can hold",
            fix="Check the target, and how config.json counts layers.",
        )


def explain_extra(name: str) -> str:
    """Return what a tensor that our module lacks is."""
    return next((what for pattern, what in EXTRAS.items() if re.search(pattern, name)), "unknown tensors")

"""Capture with transformers, for models that vLLM cannot run on this machine and as the reference for vLLM's states.

Runs one sample at a time in the target's dtype, or in the engine's `dtype` argument. Hooks keep the outputs of the
decoder layers and the input of the final norm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.vml import settle_vector_functions
from drafts.moving import find_device
from dump.capture import Staged, Staging
from recipe.recipe import Recipe
from target.target import Target

NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm")
FFN_NAMES = ("mlp", "block_sparse_moe", "feed_forward", "ffn")


class Transformers:
    """The target in transformers, with hooks that keep its hidden states."""

    name = "transformers"
    is_reference = True

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        layer_ids: Sequence[int],
        _: Staging | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Load the target, by default onto the GPU if there is one.

        Raises UserError if its decoder layers cannot be found.
        """
        name = str({**recipe.serve.args, **recipe.dump.args}.get("dtype", "auto"))
        dtype = name if name == "auto" else getattr(torch, name)
        device = device or find_device()
        self._model = load_model(target, dtype).to(device).eval()
        self._device = device
        layers, norm = find_layers(self._model, target)
        self._layers = layers
        self._states: dict[int, torch.Tensor] = {}
        for place, layer_id in enumerate(layer_ids):
            layers[layer_id].register_forward_hook(self._take_output(place))
        norm.register_forward_pre_hook(self._take_input(len(layer_ids)))
        self.token_bytes = (len(layer_ids) + 1) * target.hidden_size * self._model.dtype.itemsize
        self.settings = {"engine": ("transformers", version("transformers")), "dtype": name}

    def keep_ffn_outputs(self) -> dict[int, torch.Tensor]:
        """Return a dict that each later `forward` fills with the FFN outputs `(T, H)` by layer, where it finds them."""
        kept: dict[int, torch.Tensor] = {}

        def keep(layer_id: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                kept[layer_id] = states.flatten(0, -2).float().cpu()

            return hook

        for layer_id, layer in enumerate(self._layers):
            ffn = next((ffn for name in FFN_NAMES if (ffn := getattr(layer, name, None)) is not None), None)
            if ffn is not None:
                ffn.register_forward_hook(keep(layer_id))
        return kept

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the states `(T, n+1, H)` of one sample; the last is the final state before the final norm."""
        self._states.clear()
        self._model(input_ids=torch.tensor([list(token_ids)], device=self._device), use_cache=False, logits_to_keep=1)
        return torch.stack([self._states[place][0] for place in sorted(self._states)], dim=1).cpu()

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Run one forward pass for each `(sample id, token ids)`; yield the staged samples."""
        for sample_id, token_ids in samples:
            while not staging.take(len(token_ids) * self.token_bytes):
                staging.wait()
            path = staging.folder / f"{sample_id}.safetensors"
            save_file({"hidden_states": self.forward(token_ids), "token_ids": torch.tensor(token_ids)}, path)
            Path(f"{path}.lock").touch()
            yield Staged(sample_id, path)

    @property
    def engines(self) -> list[Transformers]:
        return [self]

    def close(self) -> None:
        """Do nothing: the model ends with the process."""

    def _take_output(self, place: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._states[place] = output[0] if isinstance(output, tuple) else output

        return hook

    def _take_input(self, place: int) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self._states[place] = inputs[0]

        return hook


def load_model(target: Target, dtype: Any) -> Any:
    """Load the target with transformers, also if its language model is part of a vision-language model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settle_vector_functions()
    model_type = json.loads((target.path / "config.json").read_text())["model_type"]
    text_only = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = transformers.AutoModelForCausalLM if text_only else transformers.AutoModelForImageTextToText
    return auto.from_pretrained(target.path, dtype=dtype)


def find_layers(model: torch.nn.Module, target: Target) -> tuple[torch.nn.ModuleList, torch.nn.Module]:
    """Return the decoder layers and the final norm. Raises UserError unless exactly one module has both."""
    found = []
    for module in model.modules():
        layers = getattr(module, "layers", None)
        norm = next((norm for name in NORM_NAMES if (norm := getattr(module, name, None)) is not None), None)
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == target.num_layers and norm is not None:
            found.append((layers, norm))
    if len(found) != 1:
        raise UserError(
            target.path,
            found=f"{len(found)} lists of {target.num_layers} decoder layers with a norm beside them",
            expected="one",
            fix="Use dump.backend=vllm for this architecture.",
        )
    return found[0]

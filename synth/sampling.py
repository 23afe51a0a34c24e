"""Resolve the sampling parameters of a run: the recipe's, else those of the target's generation_config.json.

vLLM applies that file's values to requests that lack them, so all are sent and recorded. Source: the list in
vllm/config/model.py, get_diff_sampling_param (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.files import hash_bytes, read_json
from contracts.conversation import NO_FILTERS, NO_PENALTIES
from recipe.recipe import Recipe
from synth.prompts import Prompt
from target.target import find_folder


@dataclass(frozen=True)
class SharedSampling:
    """The sampling parameters of a run without temperature and seed, which differ between conversations."""

    temperatures: list[float]
    filters: dict[str, float | int]
    """top_p, top_k and min_p; they have no effect at temperature 0."""
    penalties: dict[str, float]
    """They also change the greedy choice."""
    max_tokens: int
    seed: int

    def of(self, prompt: Prompt) -> dict[str, Any]:
        """Return the parameters of one conversation; its seed follows from the recipe's seed and its id."""
        shared = {**self.penalties, "max_tokens": self.max_tokens}
        if prompt.temperature == 0:
            return {"temperature": 0.0, **shared}
        seed = int(hash_bytes(f"{self.seed}/{prompt.id}".encode())[:8], 16) >> 1
        return {"temperature": prompt.temperature, **self.filters, **shared, "seed": seed}

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resume must not change."""
        return {"temperature": self.temperatures, **self.filters, **self.penalties}


def resolve_sampling(recipe: Recipe) -> SharedSampling:
    """Return the run's sampling parameters.

    Raises UserError if neither recipe nor target has a temperature, or if values contradict each other.
    """
    synth = recipe.synth
    path = find_folder(recipe.target.path) / "generation_config.json"
    of_target = read_json(path, "the target's generation_config.json") if path.exists() else {}

    def resolve(neutral: Mapping[str, float | int]) -> dict[str, Any]:
        values = {name: (getattr(synth, name), of_target.get(name), off) for name, off in neutral.items()}
        return {name: next(v for v in options if v is not None) for name, options in values.items()}

    filters = resolve(NO_FILTERS)
    if filters["top_k"] == 0:  # off in transformers and vLLM; SGLang refuses it
        filters["top_k"] = -1
    shared = SharedSampling(
        _resolve_temperatures(recipe, of_target, str(path)),
        filters,
        resolve(NO_PENALTIES),
        synth.max_tokens,
        synth.seed,
    )
    if 0.0 in shared.temperatures and synth.num_samples > 1:
        raise UserError(
            "synth.num_samples",
            found=f"{synth.num_samples} samples at temperature 0",
            expected="one: all would be the same",
            fix="Raise the temperature, or ask for one sample.",
        )
    if synth.max_tokens >= recipe.target.max_model_len:
        raise UserError(
            "synth.max_tokens",
            found=str(synth.max_tokens),
            expected=f"fewer than target.max_model_len ({recipe.target.max_model_len}), which holds prompt and reply",
            fix="Lower the one or raise the other.",
        )
    return shared


def _resolve_temperatures(recipe: Recipe, of_target: Mapping[str, Any], where: str) -> list[float]:
    temperature = recipe.synth.temperature
    if temperature is None:
        temperature = 0.0 if of_target.get("do_sample") is False else of_target.get("temperature")
    if temperature is None:
        raise UserError(
            "synth.temperature",
            found=f"none in the recipe, none in {where}",
            expected="a temperature, as the draft will be served with",
            fix="Set synth.temperature (0: greedy).",
        )
    return [float(value) for value in (temperature if isinstance(temperature, list) else [temperature])]

"""What the stages need to know of a target, read from its folder without loading it.

Reads: `config.json` (nested `text_config`/`llm_config` too), the tokenizer's files and the headers of the weights.

Layer ids: a recipe, a store and an exported draft call "the output of layer i" by the 0-based `i`; vLLM's extraction
calls it `i + 1`, and its id `L` is the final state before the final norm. The translation lives here alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.files import hash_bytes, hash_json, read_json
from contracts.recipe import FactsSection, TargetSection

NESTED_CONFIGS = ("text_config", "llm_config", "language_config")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
RMS_NORM_EPS = "rms_norm_eps"
LAYER_NORM_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
WINDOW_BYTES = 1 << 16


@dataclass(frozen=True)
class Target:
    """A target's folder and its text model's config."""

    path: Path
    config: dict[str, Any]
    facts: FactsSection | None = None

    @classmethod
    def of(cls, section: TargetSection) -> Target:
        """A recipe's target: read, if it is on this machine, else made of the recipe's facts.

        Raises UserError when there are neither.
        """
        if section.facts is None or (find_folder(section.path) / "config.json").exists():
            return replace(cls.read(section.path), facts=section.facts)
        config = section.facts.model_dump(exclude={"architecture", "final_norm", "sparse_block_size"})
        config["architectures"] = [section.facts.architecture]
        config["use_gemma_norm"] = section.facts.final_norm == "gemma"
        config["sparse_attention_config"] = {"sparse_block_size": section.facts.sparse_block_size}
        return cls(section.path, config, section.facts)

    @property
    def is_here(self) -> bool:
        """Whether its files are on this machine."""
        return (self.path / "config.json").exists()

    @classmethod
    def read(cls, path: Path) -> Target:
        """Read `path/config.json`; a hub name (`org/model`) is looked for in the local hub cache.

        Raises UserError when the folder holds no model.
        """
        path = find_folder(path)
        outer = read_json(path / "config.json", "a target's config.json")
        inner: dict[str, Any] = next((outer[key] for key in NESTED_CONFIGS if isinstance(outer.get(key), dict)), {})
        return cls(path, {**outer, **inner, "architectures": outer.get("architectures")})

    def get(self, key: str) -> int:
        """An integer of the config. Raises UserError when it is missing."""
        value = self.config.get(key)
        if not isinstance(value, int):
            raise UserError(
                self.path / "config.json", found=f"{key} = {value!r}", expected="an integer", fix="Check the target."
            )
        return value

    @property
    def hidden_size(self) -> int:
        return self.get("hidden_size")

    @property
    def num_layers(self) -> int:
        return self.get("num_hidden_layers")

    @property
    def vocab_size(self) -> int:
        return self.get("vocab_size")

    @property
    def norm_eps(self) -> float:
        return float(next((self.config[key] for key in (RMS_NORM_EPS, *LAYER_NORM_EPS) if key in self.config), 1e-6))

    @property
    def rope_theta(self) -> float:
        parameters = self.config.get("rope_parameters") or {}
        return float(parameters.get("rope_theta", self.config.get("rope_theta", 10000.0)))

    @cached_property
    def end_token_ids(self) -> set[int]:
        """The tokens that end a reply: of config.json and generation_config.json."""
        file = find_folder(self.path) / "generation_config.json"
        generation = json.loads(file.read_text()) if file.exists() else {}
        values = [config.get("eos_token_id") for config in (self.config, generation)]
        return {
            token for value in values for token in (value if isinstance(value, list) else [value]) if token is not None
        }

    @property
    def sparse_block_size(self) -> int | None:
        """Tokens of a block of its sparse attention, if it has one."""
        return (self.config.get("sparse_attention_config") or {}).get("sparse_block_size")

    @property
    def final_norm(self) -> str:
        """`rms` (x * w), `gemma` (x * (1 + w), as MiniMax-M3 and the Gemma family have it) or `layer` (LayerNorm)."""
        if RMS_NORM_EPS not in self.config and any(key in self.config for key in LAYER_NORM_EPS):
            return "layer"
        gemma = self.config.get("use_gemma_norm") or str(self.config.get("model_type", "")).startswith("gemma")
        return "gemma" if gemma else "rms"

    @cached_property
    def fingerprint(self) -> str:
        """Names these weights: config, tensor headers, sizes and windows of the data of every weight file.

        Windows rather than all bytes: a target may weigh a terabyte. Retrained weights differ in every window.
        """
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(
                self.path, found="no *.safetensors", expected="a target's weights", fix="Check target.path."
            )
        return hash_json([self.config, [_weights_signature(file) for file in files]])

    @cached_property
    def tokenizer_checksum(self) -> str:
        """sha256 over the tokenizer's files."""
        present = [self.path / name for name in TOKENIZER_FILES if (self.path / name).exists()]
        return hash_json([(file.name, hash_bytes(file.read_bytes())) for file in present])

    def find_chat_template(self) -> str | None:
        """The template's text, from chat_template.jinja or tokenizer_config.json; None without one."""
        file = self.path / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        config_file = self.path / "tokenizer_config.json"
        template = json.loads(config_file.read_text()).get("chat_template") if config_file.exists() else None
        return template if isinstance(template, str) else None

    @cached_property
    def chat_template(self) -> str:
        """`find_chat_template`. Raises UserError without one."""
        template = self.find_chat_template()
        if template is None:
            raise UserError(
                self.path, found="no chat template", expected="chat_template.jinja", fix="Add one to the target."
            )
        return template

    @property
    def template_checksum(self) -> str:
        """sha256 of the chat template's text."""
        return hash_bytes(self.chat_template.encode())


def find_folder(path: Path) -> Path:
    """The folder of a hub name's snapshot, if it is no folder itself and the cache has one. Nothing is downloaded."""
    if path.exists() or path.is_absolute() or len(path.parts) != 2:
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path.as_posix(), "config.json")
    return Path(config).parent if isinstance(config, str) else path


def _weights_signature(file: Path) -> list[Any]:
    """Name, size, header and three windows of one safetensors file (layout: 8-byte length, JSON header, data)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(header_size)
        data_start = 8 + header_size
        windows = []
        for start in (data_start, (data_start + size) // 2, max(data_start, size - WINDOW_BYTES)):
            stream.seek(start)
            windows.append(hash_bytes(stream.read(WINDOW_BYTES)))
    return [file.name, size, hash_bytes(header), windows]


def default_dflash_layers(num_layers: int, num_captured: int) -> list[int]:
    """DFlash's default layers: `round(1 + i * (L - 4) / (k - 1))`, 0-based (z-lab's rule; k = 1 gives L // 2)."""
    if num_captured == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (num_captured - 1)) for i in range(num_captured)]


def captured_layers(section: TargetSection, target: Target) -> list[int]:
    """The layers whose outputs a draft reads: the recipe's, or DFlash's. 0-based."""
    return section.aux_layers or default_dflash_layers(target.num_layers, section.num_aux_layers)


def to_vllm_layer_ids(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """vLLM's ids of our layers' outputs, and last the final state before the final norm (its id L).

    vLLM sorts the ids and drops doubles, so ours must be sorted, unique and below the last layer, whose output is the
    final state itself. Raises ValueError otherwise.
    """
    if list(layer_ids) != sorted(set(layer_ids)) or not all(0 <= i < num_layers - 1 for i in layer_ids):
        raise ValueError(f"layer ids {list(layer_ids)} are not sorted, unique and in [0, {num_layers - 1})")
    return [i + 1 for i in layer_ids] + [num_layers]

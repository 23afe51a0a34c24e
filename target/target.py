"""A target's config, checksums and fingerprint, read from its folder without loading the model.

Reads: `config.json` (nested `text_config`/`llm_config` too), the tokenizer's files and the headers of the weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_bytes, hash_json, read_json
from target.final_norm import FinalNorm, find_final_norm, find_norm_eps
from target.section import FactsSection, TargetSection

NESTED_CONFIGS = ("text_config", "llm_config", "language_config")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WINDOW_BYTES = 1 << 16


@dataclass(frozen=True)
class Target:
    """A target's folder and its text model's config. `here` and `of` add the recipe's facts and final norm."""

    path: Path
    config: dict[str, Any]
    facts: FactsSection | None = None
    norm_of_recipe: FinalNorm | None = None

    @classmethod
    def here(cls, section: TargetSection) -> Target:
        """Read a recipe's target from its folder. Raises UserError if the folder holds no model."""
        return replace(cls.read(section.path), facts=section.facts, norm_of_recipe=section.final_norm)

    @classmethod
    def of(cls, section: TargetSection) -> Target:
        """Read a recipe's target from its folder, or build it from the recipe's facts if there is no folder.

        For plans and checks, which need no weights. Raises UserError if there is neither.
        """
        facts = section.facts
        if facts is None or (find_folder(section.path) / "config.json").exists():
            return cls.here(section)
        sizes = {"num_parameters", "num_active_parameters", "kv_bytes_per_token"}
        config = facts.model_dump(exclude={"architecture", "final_norm", "sparse_block_size", *sizes})
        config["architectures"] = [facts.architecture]
        config["sparse_attention_config"] = {"sparse_block_size": facts.sparse_block_size}
        return cls(section.path, config, facts, section.final_norm or facts.final_norm or "rms")

    @property
    def is_here(self) -> bool:
        """Whether the target's config and tokenizer are on this machine."""
        return self.has_config and (self.path / "tokenizer.json").exists()

    @property
    def has_weights(self) -> bool:
        """Whether any of the target's weights are on this machine."""
        return any(self.path.glob("*.safetensors"))

    @property
    def has_config(self) -> bool:
        """Whether the target's config is on this machine; plans need no more."""
        return (self.path / "config.json").exists()

    @classmethod
    def read(cls, path: Path) -> Target:
        """Read `path/config.json`; a hub name (`org/model`) is looked up in the local hub cache.

        Raises UserError if the folder holds no model.
        """
        path = find_folder(path)
        outer = read_json(path / "config.json", "a target's config.json")
        inner: dict[str, Any] = next((outer[key] for key in NESTED_CONFIGS if isinstance(outer.get(key), dict)), {})
        return cls(path, {**outer, **inner, "architectures": outer.get("architectures")})

    def get(self, key: str) -> int:
        """Return an integer of the config, or the default of its type. Raises UserError if there is none."""
        value = self.config[key] if key in self.config else self._defaults.get(key)
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
        return find_norm_eps(self.config)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies; that of full attention where types of layers have their own (Gemma 3)."""
        found = _find_rope_theta(self.config)
        if found is None:  # the defaults import torch
            found = _find_rope_theta(self._defaults)
        return 10000.0 if found is None else float(found)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """The config of a model of this type that says nothing: checkpoints leave out what is equal (Gemma 3)."""
        from transformers import CONFIG_MAPPING

        kind = self.config.get("model_type")
        return dict(CONFIG_MAPPING[kind]().get_text_config().to_dict()) if kind in CONFIG_MAPPING else {}

    @cached_property
    def is_tied(self) -> bool:
        """Whether the config ties lm_head to the embedding; without the key, transformers' default for the type."""
        outer = read_json(self.path / "config.json", "a target's config.json") if self.has_config else {}
        said = [config["tie_word_embeddings"] for config in (outer, self.config) if "tie_word_embeddings" in config]
        if said:
            return any(said)
        from transformers import CONFIG_MAPPING

        types = [config["model_type"] for config in (outer, self.config) if config.get("model_type") in CONFIG_MAPPING]
        defaults = [getattr(CONFIG_MAPPING[name], "tie_word_embeddings", None) for name in types]
        return bool(next((default for default in defaults if default is not None), False))

    @cached_property
    def end_token_ids(self) -> set[int]:
        """The end tokens of config.json and generation_config.json."""
        file = find_folder(self.path) / "generation_config.json"
        generation = json.loads(file.read_text()) if file.exists() else {}
        values = [config.get("eos_token_id") for config in (self.config, generation)]
        return {
            token for value in values for token in (value if isinstance(value, list) else [value]) if token is not None
        }

    @property
    def sparse_block_size(self) -> int | None:
        """Block size of a sparse attention, in tokens; None without one."""
        return (self.config.get("sparse_attention_config") or {}).get("sparse_block_size")

    @property
    def architecture(self) -> str:
        """The first of the config's `architectures`, or ""."""
        return str(next(iter(self.config.get("architectures") or []), ""))

    @property
    def final_norm(self) -> FinalNorm:
        """The kind of final norm: the recipe's `target.final_norm`, or the config's."""
        return self.norm_of_recipe or find_final_norm(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config, and of the size, header and three windows of data of every weight file.

        Windows, because a target may have a terabyte of weights. Retrained weights differ in every window.
        """
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(
                self.path, found="no *.safetensors", expected="a target's weights", fix="Check target.path."
            )
        return hash_json([self.config, [_weights_signature(file) for file in files]])

    @cached_property
    def tokenizer_checksum(self) -> str:
        """sha256 of the tokenizer's files."""
        present = [self.path / name for name in TOKENIZER_FILES if (self.path / name).exists()]
        return hash_json([(file.name, hash_bytes(file.read_bytes())) for file in present])

    def find_chat_template(self) -> str | None:
        """Return the chat template of chat_template.jinja or tokenizer_config.json; None without one."""
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


def _find_rope_theta(config: Mapping[str, Any]) -> float | None:
    parameters = config.get("rope_parameters") or {}
    found: float | None = parameters.get("full_attention", parameters).get("rope_theta", config.get("rope_theta"))
    return found


def is_hub_name(path: Path) -> bool:
    """Return whether a path can only be a name on the hub (`org/model`)."""
    return not path.exists() and not path.is_absolute() and len(path.parts) == 2


def find_folder(path: Path) -> Path:
    """Return the cached snapshot of a hub name, or the path itself. Nothing is downloaded."""
    if not is_hub_name(path):
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path.as_posix(), "config.json")
    return Path(config).parent if isinstance(config, str) else path


def _weights_signature(file: Path) -> list[Any]:
    """Return name, size and hashes of one safetensors file (layout: 8-byte length, JSON header, data)."""
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

"""Write a recipe for a target from its config alone, each value with its reason.

Reads: config.json; if they are there, the tokenizer, the chat template, generation_config.json and the index of the
weights. Nothing is downloaded. The recipe passes `recipe check`, and `dump plan`, `train plan` and `bench plan` need no
other file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import read_json
from contracts.conversation import NO_FILTERS, NO_PENALTIES
from drafts import METHODS
from drafts.method import DraftMethod
from drafts.proposal import Proposal, Values
from recipe.check import check_recipe
from recipe.hardware import NODES
from recipe.load import validate_recipe
from recipe.show import inline_yaml
from target.mask_token import explain_mask_token, used_token_ids
from target.modes import Modes, find_modes
from target.section import TargetSection
from target.size import weights_bytes
from target.target import Target, find_folder, is_hub_name
from target.thinking import find_tags

SAMPLE_TOKENS = 8192
"""Tokens of prompt and reply in training, at most."""
NUM_CONVERSATIONS = 50_000
"""Assumed for the number of steps."""
BATCH_SAMPLES = 16
"""Samples of an optimizer step, about: one on each GPU at a time, so memory does not depend on the batch."""
PLAIN_ROPE_FACTOR = 4
"""Up to so many times the trained length a draft needs no YaRN (docs/yarn.md)."""
GPU = "h100"
WEIGHTS_SHARE = 0.6
"""Of a GPU's memory, for the target's weights. The rest is for the KV cache and activations."""
SWEEP_SIZES = ((1024, 1024), (8192, 1024))
"""Tokens in and out of published serving sweeps (InferenceMAX)."""
SWEEP_MARGIN = 256
"""Tokens of a sweep's context beyond input and output (serve/flags.py)."""
MAX_COLUMNS = 120
NORMS = {
    "rms": "x * w",
    "gemma": "x * (1 + w)",
    "layer": "LayerNorm, x * w + b",
    "layer1p": "LayerNorm, x * (1 + w) + b",
}


@dataclass(frozen=True)
class NewRecipe:
    """The recipe's text, what it rests on without having read it, and how to get what later stages need."""

    text: str
    notes: list[str]


def init_recipe(target: Path, method: str, gpus: int) -> NewRecipe:
    """Return a recipe for a target's folder, hub name or config.json.

    Raises UserError for a target without a usable config and for an unknown method.
    """
    if method not in METHODS:
        raise UserError("--method", found=method, expected=f"one of {', '.join(METHODS)}", fix="Correct it.")
    writer = Writer(*_find(target), METHODS[method], gpus)
    text = writer.write()
    values = yaml.safe_load(text)
    recipe = validate_recipe(target, values)
    check_recipe(recipe)
    return NewRecipe(text, writer.notes())


def _find(target: Path) -> tuple[Path, Target]:
    """Return `target.path` for the recipe, and the target. Raises UserError for one whose config is not here."""
    path = target.parent if target.name == "config.json" else target
    folder = find_folder(path)
    if (folder / "config.json").exists():
        return path, Target.read(path)
    of_hub = is_hub_name(path)
    small = f'hf download {path.as_posix()} --include "*.json" --include "*.jinja"'
    raise UserError(
        target,
        found="no config.json" + (" in the hub's cache" if of_hub else ""),
        expected="a folder or hub name of a model, or its config.json",
        fix=f"Download its small files (no weights): {small}" if of_hub else "Correct the path.",
    )


@dataclass
class Writer:
    """Writes the recipe for one target and draft method. `path`: as the recipe names the target."""

    path: Path
    target: Target
    method: DraftMethod
    gpus: int

    def write(self) -> str:
        """Return the recipe as YAML with comments. Raises: see `init_recipe`."""
        sections = {
            "target": self._target(),
            "serve": self._serve(),
            "synth": self._synth(),
            "dump": self._dump(),
            "train": self._train(),
            "export": self._export(),
            "bench": self._bench(),
        }
        name = self.path.name or self.path.resolve().name  # of "."
        head = (
            f"# A draft ({self.method.name}) for {name}, written by `recipe init` from the target's config.\n"
            "# Read the comments, and change what you know better; docs/recipe.md explains the keys."
        )
        blocks = ("\n".join([f"{name}:", *_lines(values, "  ")]) for name, values in sections.items() if values)
        return "\n\n".join([head, *blocks]) + "\n"

    def notes(self) -> list[str]:
        """Return what the recipe assumes, and how to get the files that later stages need."""
        found = []
        if not self.target.is_here:
            found.append(
                "without tokenizer.json, the embedding's last row is assumed to be free: run `recipe init` again later"
            )
        if self._template is None:
            found.append("without a chat template, thinking modes are not known: run `recipe init` again later")
        if self._ranks < self._ranks_needed:
            found.append(
                f"{self.gpus} x {GPU} do not hold the target's weights ({self._weights[0] / 1e9:.0f} GB, "
                f"{self._weights[1]}); take more or larger GPUs, or quantized weights (serve.variants)"
            )
        missing = [] if self.target.has_weights else ["the weights"]
        missing += [] if self.target.is_here else ["tokenizer.json"]
        missing += [] if self._template is not None else ["the chat template"]
        if missing:
            files = ", ".join(missing[:-1]) + (" and " if missing[:-1] else "") + missing[-1]
            found.append(f"`synth generate` and `dump run` also need {files} of {self.path}: {self._download()}")
        return found

    def _download(self) -> str:
        if not self.path.exists():
            return f"hf download {self.path.as_posix()}"
        name = str(self.target.config.get("_name_or_path") or "")
        return f"hf download {name if name.count('/') == 1 else 'ORG/NAME'} --local-dir {self.path}"

    # What is known of the target

    @cached_property
    def _proposal(self) -> Proposal:
        return self.method.propose(self.target)

    @cached_property
    def _template(self) -> str | None:
        return self.target.find_chat_template()

    @cached_property
    def _modes(self) -> Modes | None:
        return find_modes(self._template) if self._template else None

    @cached_property
    def _context(self) -> int:
        """Tokens that the target takes."""
        length = self.target.config.get("max_position_embeddings")
        return length if isinstance(length, int) and length > 0 else SAMPLE_TOKENS

    @property
    def _length(self) -> int:
        return min(SAMPLE_TOKENS, self._context)

    @cached_property
    def _weights(self) -> tuple[int, str]:
        return weights_bytes(self.target)

    @property
    def _ranks_needed(self) -> int:
        """GPUs that hold the weights, a power of two."""
        ranks = 1
        while self._weights[0] > ranks * WEIGHTS_SHARE * NODES[GPU].gpu_memory_gb * 1e9:
            ranks *= 2
        return ranks

    @property
    def _ranks(self) -> int:
        """The tensor parallel size: as many GPUs as the weights need, of those that there are."""
        return min(self._ranks_needed, 1 << (self.gpus.bit_length() - 1))

    # The sections

    def _target(self) -> Values:
        values: Values = {
            "path": (self.path.as_posix(), "a folder, or a hub name in the local cache"),
            "max_model_len": (
                self._length,
                f"tokens of prompt and reply in all stages; the target takes {self._context}",
            ),
        }
        if self._modes:
            values["thinking_mode_name"] = (self._modes.name, "the chat template's variable")
            if self._modes.values:
                values["thinking_mode_values"] = (self._modes.values, "its value for each mode")
        if self._template and (tags := find_tags(self._template)):
            values["thinking_tags"] = (list(tags), "around the reasoning, from the chat template")
        values["aux_layers"] = self._proposal.layer_ids
        why = "from the config: checked against it, and used where the target's files are missing"
        facts: Values = {"facts": (self._facts(), why)}
        if self.method.uses_mask_token:
            values["mask_token_id"] = self._mask_token({**values, **facts})
        return {**values, **facts}

    def _facts(self) -> Values:
        target = self.target
        highest = (target.vocab_size - 2, "assumed: no tokenizer.json was there")
        if target.is_here:
            highest = (max(used_token_ids(target)), "of the tokenizer, added tokens included")
        if not target.architecture:
            raise UserError(
                target.path / "config.json", found="no architectures", expected="the model's class", fix="Add it."
            )
        facts: Values = {
            "architecture": (target.architecture, ""),
            "hidden_size": (target.hidden_size, ""),
            "num_hidden_layers": (target.num_layers, ""),
            "vocab_size": (target.vocab_size, "rows of the embedding"),
            "rope_theta": (target.rope_theta, ""),
            "final_norm": (target.final_norm, f"{NORMS[target.final_norm]}; `dump verify` proves it"),
            "highest_token_id": highest,
        }
        if target.sparse_block_size:
            facts["sparse_block_size"] = (target.sparse_block_size, "of the sparse attention")
        return facts

    def _mask_token(self, values: Values) -> tuple[int, str]:
        """Return the mask token of a target with these values, and why. Raises: see `explain_mask_token`."""
        section = TargetSection.model_validate(_plain(values))
        token, why = explain_mask_token(section, Target.of(section))
        return token, why if self.target.is_here else "assumed to be a free row: no tokenizer.json was there"

    def _serve(self) -> Values:
        size, source = self._weights
        why = f"{size / 1e9:.1f} GB of weights ({source}): at most {WEIGHTS_SHARE:.0%} of {self._ranks} x {GPU}"
        args: Values = {"tensor-parallel-size": (self._ranks, why)}
        if self._ranks < self._ranks_needed:
            args["tensor-parallel-size"] = (self._ranks, f"{size / 1e9:.1f} GB of weights ({source}) do not fit")
        if self.target.sparse_block_size:
            args["block-size"] = (self.target.sparse_block_size, "block size of the sparse attention")
        if "vision_config" in self.target.config:
            args["language-model-only"] = (True, "the vision tower is not needed")
        values: Values = {"args": (args, "")}
        if (replicas := self.gpus // self._ranks) > 1:
            replicated: Values = {"data-parallel-size": (replicas, "the target on each GPU or group of GPUs")}
            values["purposes"] = ({"synth": ({"args": (replicated, "")}, "")}, "")
        return values

    def _synth(self) -> Values:
        modes = self._modes.modes if self._modes else []
        why = "each row takes one in turn: a draft learns the modes that it sees"
        values: Values = {"thinking_modes": (modes, why if modes else "the chat template has none that is known")}
        if self._template is None:
            values["thinking_modes"] = ([], "no chat template was there")
        file, source = self.target.path / "generation_config.json", "generation_config.json"
        sampling = read_json(file, "the target's generation_config.json") if file.exists() else {}
        temperature = 0.0 if sampling.get("do_sample") is False else sampling.get("temperature")
        unknown = "not in generation_config.json: set it as the draft will be served"
        values["temperature"] = (1.0, unknown) if temperature is None else (float(temperature), source)
        for name, neutral in {**NO_FILTERS, **NO_PENALTIES}.items():
            if sampling.get(name) not in (None, neutral):
                values[name] = (sampling[name], source)
        share = 3 if modes else 2  # reasoning makes long replies
        words = "three quarters" if modes else "half"
        values["max_tokens"] = (self._length * share // 4, f"of one reply: {words} of target.max_model_len")
        return values

    def _dump(self) -> Values:
        values: Values = {"dtype": ("bfloat16", "fp8_e4m3 halves the disk space")}
        if self.gpus > self._ranks:
            values["engines"] = (0, "as many as the GPUs allow, each on its own")
        return values

    def _train(self) -> Values:
        accumulated = max(1, round(BATCH_SAMPLES / self.gpus))
        batch = accumulated * self.gpus
        proposal = self._proposal
        steps = max(1, proposal.num_epochs * NUM_CONVERSATIONS // batch)
        of_gpus = "the GPU" if self.gpus == 1 else f"each of {self.gpus} GPUs"
        return {
            "draft": ({"method": (self.method.name, ""), **proposal.draft}, ""),
            "global_batch_size": (batch, "samples per optimizer step"),
            "gradient_accumulation_steps": (
                accumulated,
                f"one sample at a time on {of_gpus}: `train plan` has the memory",
            ),
            "num_steps": (
                steps,
                f"{proposal.num_epochs} epochs of {NUM_CONVERSATIONS:,} conversations (assumed): set it for yours",
            ),
            "warmup_steps": (max(1, round(proposal.warmup_share * steps)), f"{proposal.warmup_share:.0%}"),
            **proposal.train,
            "held_out_fraction": (0.01, "chooses the best checkpoint"),
            "evaluate_every": (1000, ""),
            "checkpoint_every": (500, ""),
        }

    def _export(self) -> Values:
        if self._context <= self._length:
            return {}
        values: Values = {"max_position_embeddings": (self._context, "the target's context length")}
        factor = self._context / self._length
        if factor > PLAIN_ROPE_FACTOR:
            yarn: Values = {
                "original_max_position_embeddings": (self._length, "target.max_model_len"),
                "factor": (factor, "the served length over the trained one"),
            }
            values["yarn"] = (yarn, f"more than {PLAIN_ROPE_FACTOR} times the trained length (docs/yarn.md)")
        return values

    def _bench(self) -> Values:
        sizes = [(isl, osl) for isl, osl in SWEEP_SIZES if isl + osl + SWEEP_MARGIN <= self._context]
        half = max(1, (self._context - SWEEP_MARGIN) // 2)
        space = [{"tp": self._ranks, "conc_start": 1, "conc_end": 64}]
        scenarios = [{"isl": isl, "osl": osl, "search_space": space} for isl, osl in sizes or [(half, half)]]
        sweep: Values = {
            "dataset": ("random", "a draft shows little gain on random tokens: name a JSONL file of prompts"),
            "scenarios": (scenarios, "tokens in and out, and requests in flight"),
        }
        return {"sweep": (sweep, "what `bench plan` lists and `bench sweep` measures")}


def _lines(values: Values, indent: str) -> Iterator[str]:
    """Yield the YAML lines of a section; a reason stands behind its value, or above it if the line gets too long."""
    for key, (value, why) in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{key}:" + (f"  # {why}" if why else "")
            yield from (f"{indent}  - {inline_yaml(item)}" for item in value)
            continue
        if _is_section(value):
            yield f"{indent}{key}:" + (f"  # {why}" if why else "")
            yield from _lines(value, indent + "  ")
            continue
        line = f"{indent}{key}: {inline_yaml(value)}"
        commented = f"{line:<38}  # {why}" if why else line
        if len(commented) <= MAX_COLUMNS:
            yield commented
        else:
            yield from (f"{indent}# {part}" for part in textwrap.wrap(why, MAX_COLUMNS - len(indent) - 2))
            yield line


def _plain(values: Values) -> dict[str, Any]:
    """Return a section's values without their reasons."""
    return {key: _plain(value) if _is_section(value) else value for key, (value, _) in values.items()}


def _is_section(value: Any) -> bool:
    """Return whether a value holds values with reasons."""
    return isinstance(value, dict) and bool(value) and all(isinstance(inner, tuple) for inner in value.values())

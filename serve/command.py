"""The vLLM command of a recipe's target, with or without a draft.

Reads: the recipe's `target` and `serve` sections; of a draft, its `config.json` and `draftline.json`.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, hash_json
from contracts.draft import DESCRIPTOR_FILE, Descriptor
from drafts.published import num_speculative_tokens, read_descriptor
from recipe.check import check_block_size, check_kv_dtype
from recipe.recipe import Recipe
from recipe.serve import HeadSection, Purpose, PurposeSection, VariantSection
from serve.engine import engine_env, is_cpu_engine
from serve.hardware import check_fit, find_node
from target.target import Target

MODEL_NAME = "target"


@dataclass(frozen=True)
class ServeCommand:
    """What starts a server: vLLM's arguments after `vllm`, the environment additions, and where it listens."""

    args: list[str]
    env: dict[str, str]
    host: str
    port: int
    on_cpu: bool = False
    module: str = "serve.vllm_main"

    @property
    def argv(self) -> list[str]:
        """The command as our own processes start it."""
        return [sys.executable, "-m", self.module, *self.args]

    @property
    def program(self) -> list[str]:
        """The words before the arguments, as a person would type them."""
        is_vllm = self.module == "serve.vllm_main" and not self.on_cpu
        return ["vllm"] if is_vllm else ["python", "-m", self.module]

    def to_shell(self) -> str:
        """The command for a person to paste: environment first, one flag a line."""
        lines = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " \\\n".join([*lines, shlex.join([*self.program, *self.args[:2]]), *_indent(self.args[2:])])

    def to_json(self) -> str:
        """Environment and arguments as JSON."""
        return json.dumps({"env": self.env, "command": [*self.program, *self.args]}, indent=2)

    def to_docker(self, image: str, *, rocm: bool = False) -> str:
        """The command in a container of `image`, whose entry point is `vllm serve`.

        Folders of this machine are mounted under their own paths; the port is published where the server would listen.
        """
        lines = ["docker run --rm --ipc=host"]
        lines += ["  --device /dev/kfd", "  --device /dev/dri", "  --group-add video"] if rocm else ["  --gpus all"]
        lines += [f"  -e {key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        lines += [
            f"  -p {self.host}:{self.port}:{self.port}",
            '  -e HF_HOME=/huggingface -v "$HOME/.cache/huggingface:/huggingface"',
        ]
        folders = [word for word in (*self.args, *_strings_in_json(self.args)) if Path(word).is_absolute()]
        lines += [f"  -v {shlex.quote(f'{folder}:{folder}:ro')}" for folder in dict.fromkeys(folders)]
        args = list(self.args)
        args[args.index("--host") + 1] = "0.0.0.0"  # noqa: S104 (inside the container; -p says who reaches it)
        return " \\\n".join([*lines, f"  {image} {shlex.quote(args[1])}", *_indent(args[2:], "    ")])


@dataclass(frozen=True)
class Sizes:
    """Tokens in and out of a request, and requests at a time, for which a server is sized."""

    isl: int | None = None
    osl: int | None = None
    concurrency: int | None = None


def build_command(
    recipe: Recipe,
    target: Target,
    *,
    port: int,
    draft: Path | str | None = None,
    purpose: Purpose | None = None,
    sizes: Sizes = Sizes(),
    extra_args: Mapping[str, Any] | None = None,
) -> ServeCommand:
    """The command that serves `target` on `port`, drafting with `draft`: an export's folder, or one of serve.heads.

    Layers of flags, of which the last one wins: the recipe's `serve.args`; the node's GPUs; `serve.variants`;
    `serve.purposes` (and `dump.args` for the dump); `sizes`; `extra_args`.

    Raises UserError when the draft was not made for this target, or when the flags contradict target, purpose or node.
    """
    section = recipe.serve
    if section.backend == "sglang":
        return build_sglang_command(recipe, target, port=port, draft=draft, extra_args=extra_args)
    variant = _find(section.variants, section.variant, "--variant")
    node = find_node(section.hardware) if section.hardware else None
    of_purpose = section.purposes.get(purpose, PurposeSection()) if purpose else PurposeSection()
    speculative: dict[str, Any] = {}
    if draft is not None:
        speculative = speculation_of(recipe, target, draft)
        speculative |= {**section.speculative, **(variant.speculative if variant else {})}
    flags: dict[str, Any] = {
        "served-model-name": MODEL_NAME,
        "host": section.host,
        "port": port,
        "max-model-len": recipe.target.max_model_len,
        **section.args,
        **({"tensor-parallel-size": node.num_gpus} if node else {}),
        **(variant.args if variant else {}),
        **of_purpose.args,
        **(recipe.dump.args if purpose == "dump" else {}),
        **size_flags(sizes, int(speculative.get("num_speculative_tokens", 0))),
        **(extra_args or {}),
    }
    if speculative:
        flags["speculative-config"] = json.dumps(speculative)
    env = {**section.env, **(variant.env if variant else {}), **of_purpose.env}
    env |= recipe.dump.env if purpose == "dump" else {}
    check_flags(flags, target, purpose)
    if node and variant and section.hardware:
        if variant.hardware and section.hardware not in variant.hardware:
            raise UserError(
                f"--variant {section.variant} --hardware {section.hardware}",
                found=f"{section.hardware}, which cannot run {section.variant}",
                expected=f"one of {', '.join(variant.hardware)}",
                fix="Choose another variant for this hardware.",
            )
        check_fit(str(section.variant), variant.memory_gb, section.hardware, node, _count_gpus(flags))
    model = variant.path if variant else str(target.path)
    on_cpu = node is None and is_cpu_engine()
    environment = engine_env(env, on_cpu=on_cpu)
    if not Path(model).exists():
        environment.pop("HF_HUB_OFFLINE")  # a hub name may have to be fetched
    return ServeCommand(["serve", model, *to_flags(flags)], environment, section.host, port, on_cpu=on_cpu)


def build_sglang_command(
    recipe: Recipe,
    target: Target,
    *,
    port: int,
    draft: Path | str | None = None,
    extra_args: Mapping[str, Any] | None = None,
) -> ServeCommand:
    """SGLang's command for the target: flags of `serve.sglang_args`, and the node's GPUs.

    Raises UserError with a draft: drafts are served, and measured, by vLLM.
    """
    section = recipe.serve
    if draft is not None:
        raise UserError("serve.backend", found="sglang with a draft", expected="vllm", fix="Serve drafts with vLLM.")
    node = find_node(section.hardware) if section.hardware else None
    flags = {
        "model-path": str(target.path),
        "served-model-name": MODEL_NAME,
        "host": section.host,
        "port": port,
        "context-length": recipe.target.max_model_len,
        "tp": node.num_gpus if node else section.args.get("tensor-parallel-size", 1),
        **section.sglang_args,
        **(extra_args or {}),
    }
    return ServeCommand(to_flags(flags), dict(section.env), section.host, port, module="sglang.launch_server")


def size_flags(sizes: Sizes, num_draft_tokens: int) -> dict[str, int]:
    """Flags for a load: a context of ISL + OSL + 256, 2 * ISL batched tokens, CUDA graphs for all that run at a time.

    The capture size is the next power of two from concurrency * (1 + draft tokens) on, from 4 to 2048.
    """
    flags = {}
    if sizes.isl is not None and sizes.osl is not None:
        flags["max-model-len"] = sizes.isl + sizes.osl + 256
        flags["max-num-batched-tokens"] = 2 * sizes.isl
    if sizes.concurrency is not None:
        wanted = sizes.concurrency * (1 + num_draft_tokens)
        flags["max-cudagraph-capture-size"] = min(2048, max(4, 1 << (wanted - 1).bit_length()))
    return flags


def check_flags(flags: Mapping[str, Any], target: Target, purpose: str | None) -> None:
    """Raise UserError for flags that would spoil what comes out."""
    check_block_size("", flags, target)
    if purpose == "dump":
        check_kv_dtype(str(flags.get("kv-cache-dtype", "auto")))
    if purpose in ("synth", "dump"):
        for flag in ("reasoning-parser", "tool-call-parser"):
            if flag in flags:
                raise UserError(
                    flag,
                    found=str(flags[flag]),
                    expected=f"none for {purpose}: it takes tokens out of the reply's text",
                    fix="Set it in serve.purposes.production.args.",
                )
    if purpose == "synth" and flags.get("exclude-tools-when-tool-choice-none") is True:
        raise UserError(
            "exclude-tools-when-tool-choice-none",
            found="true",
            expected="false for synth: prompts would lack their tools",
            fix="Set it in serve.purposes.production.args.",
        )


def parse_flags(words: Sequence[str]) -> dict[str, str | bool]:
    """vLLM's own words (`--name value`, `--name=value`, `--name`) as flags. Raises UserError for a word of no flag."""
    flags: dict[str, str | bool] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            flags[name] = value if separator else True
            name = None if separator else name
        elif name is None:
            raise UserError("vLLM's flags", found=repr(word), expected="--name value", fix="Quote values with spaces.")
        else:
            flags[name], name = word, None
    return flags


def to_flags(values: Mapping[str, Any]) -> list[str]:
    """vLLM flags: true becomes `--name`, false `--no-name`, anything else `--name value`."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def speculation_of(recipe: Recipe, target: Target, draft: Path | str) -> dict[str, Any]:
    """vLLM's speculative config of an export's folder, or of one of serve.heads, by its name.

    Raises UserError when the draft was made for another target.
    """
    head = recipe.serve.heads.get(str(draft))
    return of_head(head, target) if head else speculative_config(Path(draft), target)


def fingerprint_draft(recipe: Recipe, draft: Path | str) -> str:
    """What a draft is: the content of an export's folder, or the recipe's words for one of serve.heads."""
    if (head := recipe.serve.heads.get(str(draft))) is not None:
        return hash_json(head.model_dump(mode="json"))
    files = [Path(draft) / "config.json", *sorted(Path(draft).glob("*.safetensors"))]
    return hash_json([hash_file(file) for file in files])


def of_head(head: HeadSection, target: Target) -> dict[str, Any]:
    """vLLM's speculative config of a published draft, whose sizes are checked if it is on this machine."""
    folder = Path(head.path)
    if (folder / "config.json").exists():
        check_draft(folder, read_descriptor(folder), target)
    return {"method": head.method, "model": head.path, "num_speculative_tokens": head.num_speculative_tokens}


def speculative_config(draft: Path, target: Target) -> dict[str, Any]:
    """vLLM's speculative config of an exported draft, from its descriptor.

    Raises UserError when hidden size, vocabulary, layers or fingerprint are not the target's.
    """
    descriptor = read_descriptor(draft)
    check_draft(draft, descriptor, target)
    return {
        **descriptor.speculative,
        "model": str(draft),
        "num_speculative_tokens": num_speculative_tokens(descriptor, draft),
    }


def check_draft(draft: Path, descriptor: Descriptor, target: Target) -> None:
    """Raise UserError for a draft that was made for another target."""
    expected = {
        "hidden_size": (descriptor.hidden_size, target.hidden_size),
        "vocab_size": (descriptor.vocab_size, target.vocab_size),
        "num_target_layers": (descriptor.num_target_layers or target.num_layers, target.num_layers),
    }
    for key, (found, wanted) in expected.items():
        if found != wanted:
            raise UserError(
                draft / "config.json",
                found=f"{key} = {found}",
                expected=f"{wanted} as in {target.path}",
                fix="Serve the draft with the target it was trained for.",
            )
    if any(not 0 <= layer_id < target.num_layers for layer_id in descriptor.layer_ids):
        raise UserError(
            draft / "config.json",
            found=f"layers {descriptor.layer_ids}",
            expected=f"layers of {target.path}, which has {target.num_layers}",
            fix="Serve the draft with the target it was trained for.",
        )
    made_for = descriptor.target_fingerprint
    if made_for is not None and target.is_here and made_for != target.fingerprint:
        raise UserError(
            draft / DESCRIPTOR_FILE,
            found=f"a draft for target {made_for[:12]}",
            expected=f"one for {target.fingerprint[:12]} ({target.path})",
            fix="Train a draft for this target, or serve the other one.",
        )


def _find(variants: Mapping[str, VariantSection], name: str | None, where: str) -> VariantSection | None:
    if name is None:
        return None
    if name not in variants:
        known = ", ".join(variants) or "none: the recipe has no serve.variants"
        raise UserError(where, found=name, expected=f"one of {known}", fix="Correct it.")
    return variants[name]


def _count_gpus(flags: Mapping[str, Any]) -> int:
    names = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    return math.prod(int(flags.get(name, 1)) for name in names)


def _indent(args: Sequence[str], by: str = "  ") -> list[str]:
    """One line for each flag with its value."""
    lines: list[str] = []
    for word in args:
        if word.startswith("--") or not lines:
            lines.append(by + shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


def _strings_in_json(args: Sequence[str]) -> list[str]:
    """Strings inside of arguments that are JSON objects: a draft's folder."""
    return [v for word in args if word.startswith("{") for v in json.loads(word).values() if isinstance(v, str)]

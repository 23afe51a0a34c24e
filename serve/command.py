"""The vLLM command of a recipe's target, with or without a draft.

Reads: the recipe's `target` and `serve` sections; of a draft, its `config.json` and `draftline.json`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, hash_json, read_json
from common.hub import revision_of
from contracts.draft import DESCRIPTOR_FILE, Descriptor
from drafts import METHODS
from drafts.published import num_speculative_tokens, read_descriptor
from recipe.hardware import check_fit, find_node
from recipe.recipe import Recipe
from recipe.serve import HeadSection, Purpose, ServeSection
from serve.engine import engine_env, is_cpu_engine
from serve.flags import (
    Sizes,
    check_flags,
    check_parsers,
    check_speculation,
    count_gpus,
    find_purpose,
    find_variant,
    layer_flags,
    normalize,
    normalize_sglang,
    size_flags,
    speculative_overrides,
    to_flags,
    uses_sglang,
)
from target.target import Target

MODEL_NAME = "target"
CHECKOUT = Path(__file__).resolve().parent.parent
CHECKOUT_IN_CONTAINER = "/draftline"
SERVER_MODULE = "serve.vllm_main"


@dataclass(frozen=True)
class ServeCommand:
    """The command that starts a server: vLLM's arguments after `vllm`, environment additions, host and port."""

    args: list[str]
    env: dict[str, str]
    host: str
    port: int
    on_cpu: bool = False
    module: str = SERVER_MODULE

    @property
    def argv(self) -> list[str]:
        """The command as stages start it."""
        return [sys.executable, "-m", self.module, *self.args]

    @property
    def program(self) -> list[str]:
        """The words before the arguments, as a person would type them."""
        is_vllm = self.module == SERVER_MODULE and not self.on_cpu
        return ["vllm"] if is_vllm else ["python", "-m", self.module]

    def to_shell(self) -> str:
        """Return the command for a shell: environment first, one flag per line."""
        lines = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " \\\n".join([*lines, shlex.join([*self.program, *self.args[:2]]), *_indent(self.args[2:])])

    def to_json(self) -> str:
        """Return environment and command as JSON."""
        return json.dumps({"env": self.env, "command": [*self.program, *self.args]}, indent=2)

    def to_docker(self, image: str, *, rocm: bool = False) -> str:
        """Return the command in a container of `image`, a GPU build whose entry point is `vllm serve`.

        Folders of this machine are mounted under their own paths; the port is published on the server's host. This
        checkout is mounted, too: vLLM loads its plugins and connector.
        """
        lines = ["docker run --rm --ipc=host"]
        lines += ["  --device /dev/kfd", "  --device /dev/dri", "  --group-add video"] if rocm else ["  --gpus all"]
        lines += [f"  -e {key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        lines += [
            f"  -p {self.host}:{self.port}:{self.port}",
            '  -e HF_HOME=/huggingface -v "$HOME/.cache/huggingface:/huggingface"',
            f"  -e PYTHONPATH={CHECKOUT_IN_CONTAINER} -v {shlex.quote(f'{CHECKOUT}:{CHECKOUT_IN_CONTAINER}:ro')}",
        ]
        folders = [word for word in (*self.args, *_strings_in_json(self.args)) if Path(word).is_absolute()]
        folders = [_whole_repository(folder) for folder in folders]
        lines += [f"  -v {shlex.quote(f'{folder}:{folder}:ro')}" for folder in dict.fromkeys(folders)]
        lines += [f"  -v {shlex.quote(f'{folder}:{folder}')}" for folder in _written_folders(self.args)]
        args = list(self.args)
        args[args.index("--host") + 1] = "0.0.0.0"  # noqa: S104 (inside the container; -p says who reaches it)
        return " \\\n".join([*lines, f"  {image} {shlex.quote(args[1])}", *_indent(args[2:], "    ")])


@dataclass(frozen=True)
class Serving:
    """The use of a server: its draft, its purpose and load (which choose flags), and flags that override all others.

    `draft` is the folder of an export, or the name of one of serve.heads. `on_cpu`: whether the engine is the CPU
    build; None: the installed one is, and the recipe names no GPUs.
    """

    draft: Path | str | None = None
    purpose: Purpose | None = None
    sizes: Sizes = field(default_factory=Sizes)
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    on_cpu: bool | None = None


def build_command(recipe: Recipe, target: Target, *, port: int, serving: Serving | None = None) -> ServeCommand:
    """Return the command that serves `target` on `port`.

    Later flags override earlier ones: `layer_flags`, the sizes, `extra_args`.
    Raises UserError if the draft was not made for this target, or the flags contradict target, purpose or hardware.
    """
    serving = serving or Serving()
    section, purpose = recipe.serve, serving.purpose
    if uses_sglang(section, purpose):
        return _build_sglang_command(recipe, target, port, serving)
    variant = find_variant(section)
    speculative: dict[str, Any] = {}
    if serving.draft is not None:
        speculative = speculation_of(recipe, target, serving.draft)
        speculative |= speculative_overrides(section)
    flags: dict[str, Any] = {
        "served-model-name": MODEL_NAME,
        "host": section.host,
        "port": port,
        "max-model-len": recipe.target.max_model_len,
        **layer_flags(recipe, purpose),
        **size_flags(serving.sizes, int(speculative.get("num_speculative_tokens", 0))),
        **normalize(serving.extra_args),
    }
    if speculative:
        check_speculation(speculative, flags)
        flags["speculative-config"] = json.dumps(speculative)
    check_flags(flags, target, purpose)
    _check_node(section, flags)
    env = {**section.env, **(variant.env if variant else {}), **find_purpose(section, purpose).env}
    env |= recipe.dump.env if purpose == "dump" else {}
    model = variant.path if variant else str(target.path)
    on_cpu = serving.on_cpu
    if on_cpu is None:
        on_cpu = section.hardware is None and is_cpu_engine()
    environment = engine_env(env, on_cpu=on_cpu)
    if not Path(model).exists():
        environment.pop("HF_HUB_OFFLINE")  # vLLM may have to download a hub name
    return ServeCommand(["serve", model, *to_flags(flags)], environment, section.host, port, on_cpu=on_cpu)


def _check_node(section: ServeSection, flags: Mapping[str, Any]) -> None:
    """Raise UserError if the recipe's variant does not run on its hardware or exceeds its memory."""
    variant, hardware = find_variant(section), section.hardware
    if variant is None or hardware is None:
        return
    if variant.hardware and hardware not in variant.hardware:
        raise UserError(
            f"--variant {section.variant} --hardware {hardware}",
            found=f"{hardware}, which cannot run {section.variant}",
            expected=f"one of {', '.join(variant.hardware)}",
            fix="Choose another variant for this hardware.",
        )
    check_fit(str(section.variant), variant.memory_gb, hardware, find_node(hardware), count_gpus(flags))


def _build_sglang_command(recipe: Recipe, target: Target, port: int, serving: Serving) -> ServeCommand:
    """Return SGLang's command for the target, with the flags of `serve.sglang_args` and the node's GPUs.

    Raises UserError for a draft in a layout that SGLang does not read.
    """
    section = recipe.serve
    flags = {
        "model-path": str(target.path),
        "served-model-name": MODEL_NAME,
        "host": section.host,
        "port": port,
        "context-length": recipe.target.max_model_len,
        **(_sglang_draft(recipe, target, serving.draft) if serving.draft is not None else {}),
        **layer_flags(recipe, serving.purpose),
        **normalize_sglang(serving.extra_args),
    }
    check_parsers(flags, serving.purpose)
    return ServeCommand(to_flags(flags), dict(section.env), section.host, port, module="sglang.launch_server")


def _sglang_draft(recipe: Recipe, target: Target, draft: Path | str) -> dict[str, Any]:
    """Return SGLang's flags of a draft. Raises UserError if it is not a folder here that SGLang reads."""
    speculation = speculation_of(recipe, target, draft)
    folder = Path(str(speculation["model"]))
    config = read_json(folder / "config.json", "a draft exported by `train export`")
    method = METHODS[read_descriptor(folder).method]
    flags = method.sglang_flags(folder, config, int(speculation["num_speculative_tokens"]))
    return {**flags, "speculative-draft-model-path": str(folder)}


def speculation_of(recipe: Recipe, target: Target, draft: Path | str) -> dict[str, Any]:
    """Return vLLM's speculative config for an export's folder or the name of one of serve.heads.

    Raises UserError if the draft was made for another target.
    """
    head = recipe.serve.heads.get(str(draft))
    return of_head(head, target) if head else speculative_config(Path(draft), target)


def fingerprint_draft(recipe: Recipe, draft: Path | str) -> str:
    """Hash a draft: the config and weights in an export's folder, or the recipe's entry in serve.heads."""
    if (head := recipe.serve.heads.get(str(draft))) is not None:
        return hash_json(head.model_dump(mode="json"))
    return fingerprint_files(Path(draft))


def fingerprint_files(folder: Path) -> str:
    """Hash the config and weights in an export's folder."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hash_json([hash_file(file) for file in files])


def draft_inputs(recipe: Recipe, draft: Path | str) -> dict[str, str]:
    """Return the inputs of a run with a draft: its hash, and the repository and commit of a snapshot of the hub."""
    revision = None if str(draft) in recipe.serve.heads else revision_of(Path(draft))
    return {"draft": fingerprint_draft(recipe, draft), **({"draft_revision": revision} if revision else {})}


def of_head(head: HeadSection, target: Target) -> dict[str, Any]:
    """Return vLLM's speculative config of a published draft; check the draft if its files are here."""
    folder = Path(head.path)
    if (folder / "config.json").exists():
        check_draft(folder, read_descriptor(folder), target)
    return {"method": head.method, "model": head.path, "num_speculative_tokens": head.num_speculative_tokens}


def speculative_config(draft: Path, target: Target) -> dict[str, Any]:
    """Return vLLM's speculative config of an exported draft, from its descriptor.

    Raises UserError if hidden size, vocabulary, layers or fingerprint are not the target's.
    """
    descriptor = read_descriptor(draft)
    check_draft(draft, descriptor, target)
    return {
        **descriptor.speculative,
        "model": str(draft),
        "num_speculative_tokens": num_speculative_tokens(descriptor, draft),
    }


def check_draft(draft: Path, descriptor: Descriptor, target: Target) -> None:
    """Raise UserError if the draft was made for another target."""
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
    if made_for is not None and target.has_weights and made_for != target.fingerprint:
        raise UserError(
            draft / DESCRIPTOR_FILE,
            found=f"a draft for target {made_for[:12]}",
            expected=f"one for {target.fingerprint[:12]} ({target.path})",
            fix="Train a draft for this target, or serve the other one.",
        )


def _whole_repository(folder: str) -> str:
    """Return the repository's folder of a snapshot in the hub's cache, whose files are links into it."""
    return str(Path(folder).parent.parent) if revision_of(Path(folder)) else folder


def _indent(args: Sequence[str], by: str = "  ") -> list[str]:
    """Return one indented line per flag with its value."""
    lines: list[str] = []
    for word in args:
        if word.startswith("--") or not lines:
            lines.append(by + shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


def _written_folders(args: Sequence[str]) -> list[str]:
    """Return the folder that the connector of extracted states writes to, if there is one."""
    if "--kv-transfer-config" not in args:
        return []
    config = json.loads(args[args.index("--kv-transfer-config") + 1])
    folder = config.get("kv_connector_extra_config", {}).get("shared_storage_path", "")
    return [folder] if Path(folder).is_absolute() else []


def _strings_in_json(args: Sequence[str]) -> list[str]:
    """Return the strings in arguments that are JSON objects, such as a draft's folder."""
    return [v for word in args if word.startswith("{") for v in json.loads(word).values() if isinstance(v, str)]

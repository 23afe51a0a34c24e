"""What is known of a draft's training data: the store, the conversations in it, and the prompts that they answer.

Reads: the store's manifest.json and run.json; the folder of its conversations, if it is still there; the prompts'
       manifest, as `synth prepare` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, hash_json, read_json
from contracts.certificate import DataFacts, PromptFacts, PromptSource, StoreFacts, SynthesisFacts
from contracts.conversation import CONVERSATIONS_FILE, hash_conversations
from contracts.store import Store

SAMPLING = (
    "thinking_modes", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "max_tokens", "num_samples", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class DataFolders:
    """The training data: its store, which names its conversations, and the prompts' manifest; None if not at hand."""

    store: Path | None = None
    prompts: Path | None = None


def describe_data(run: Mapping[str, Any], conversations: str, folders: DataFolders) -> DataFacts:
    """Return the facts of a training run's data. `run`: its state; `conversations`: the checksum that the draft names.

    Raises UserError for a store, conversations or prompts other than those that it was trained on.
    """
    counts, inputs = run["summary"], run["inputs"]
    facts = DataFacts(
        conversations=conversations, store=inputs["store"], samples=counts["samples"], held_out=counts["held_out"]
    )
    if folders.store is None:
        return facts
    store = Store(folders.store)
    manifest = store.read_manifest()
    _compare(store.ledger_path, store.checksum, inputs["store"], "the samples")
    _compare(store.manifest_path, manifest.conversations, conversations, "the conversations that the manifest names")
    state = read_json(store.folder / "run.json", "the output of `dump run`")
    facts = facts.model_copy(
        update={
            "store_facts": StoreFacts(
                manifest=hash_file(store.manifest_path),
                engine=manifest.engine,
                engine_version=manifest.engine_version,
                quantization=manifest.quantization,
                dtype=manifest.dtype,
                layer_ids=manifest.layer_ids,
                counts=_counts(state),
                environment=state.get("environment", {}),
            )
        }
    )
    source = Path(manifest.conversations_folder or store.folder)
    if not (source / CONVERSATIONS_FILE).exists():
        return facts
    synthesis = _describe_synthesis(source, conversations)
    facts = facts.model_copy(update={"synthesis": synthesis})
    if folders.prompts is None:
        return facts
    return facts.model_copy(update={"prompts": _describe_prompts(folders.prompts, synthesis.prompts)})


def _describe_synthesis(folder: Path, expected: str) -> SynthesisFacts:
    """Return the facts of the training conversations. Raises UserError if they are others."""
    _compare(folder / CONVERSATIONS_FILE, hash_conversations([folder]), expected, "the conversations")
    state = read_json(folder / "run.json", "the output of `synth generate`")
    settings = (state.get("settings") or {}).get("synth", {})
    return SynthesisFacts(
        prompts=str(state["inputs"]["prompts"]),
        sampling={key: settings[key] for key in SAMPLING if key in settings},
        counts=_counts(state),
        environment=state.get("environment", {}),
    )


def _describe_prompts(path: Path, expected: str) -> PromptFacts:
    """Return the facts of the prompts' manifest. Raises UserError if it is of other prompts."""
    manifest = read_json(path, "a prompts' manifest, as `synth prepare` writes it")
    checksum = hash_json([(manifest.get("output") or {}).get("sha256")])  # that of a prompt set of one file
    _compare(path, checksum, expected, "prompts")
    return PromptFacts(
        manifest=hash_file(path),
        sources=[
            PromptSource(
                name=source["name"],
                origin=_without_folder(str(source["origin"])),
                rows=source["rows"],
                kept=source["counts"]["kept"],
                license=source["license"],
            )
            for source in manifest["sources"]
        ],
        evaluation_sets=[found["name"] for found in manifest["evaluation_sets"]],
    )


def _without_folder(origin: str) -> str:
    """Return a name on the hub as it is, and of a path of this machine the last part."""
    return Path(origin).name if Path(origin).is_absolute() else origin


def _compare(path: Path, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise UserError(
            path,
            found=f"{what} with checksum {found[:12]}",
            expected=f"{expected[:12]}, on which the draft was trained",
            fix="Give the data of this draft; or it was changed after the training.",
        )


def _counts(state: Mapping[str, Any]) -> dict[str, int]:
    return {key: value for key, value in (state.get("summary") or {}).items() if isinstance(value, int)}

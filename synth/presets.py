"""Prompt sets that drafts are trained on, by name: repository, columns, license and size.

Sources: the sets' cards and viewers on the hub (`https://huggingface.co/datasets/REPOSITORY`), and for sizes the lists
of speculators (scripts/response_regeneration/README.md) and SpecForge (docs, "Data Preparation"). A license may
restrict what a draft is used for: check the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A set of the hub. `columns`: by the key of a prompt row (contracts/prompts.py) that they hold. `rows`: about."""

    repository: str
    license: str
    rows: int
    columns: Mapping[str, str]
    config: str | None = None
    split: str = "train"
    note: str = ""
    other_splits: tuple[str, ...] = field(default=())


PRESETS = {
    "ultrachat": Preset(
        "HuggingFaceH4/ultrachat_200k",
        "mit",
        207_865,
        {"messages": "messages", "id": "prompt_id"},
        split="train_sft",
        note="chats of several turns",
        other_splits=("train_gen", "test_sft", "test_gen"),
    ),
    "sharegpt": Preset(
        "Aeala/ShareGPT_Vicuna_unfiltered",
        "apache-2.0",
        120_000,
        {"conversations": "conversations", "id": "id"},
        note="chats of users with ChatGPT, many turns",
    ),
    "magpie": Preset(
        "Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered",
        "llama3.1",
        300_000,
        {"prompt": "instruction", "id": "uuid", "category": "task_category"},
        note="instructions that Llama 3.1 70B wrote",
    ),
    "opencodeinstruct": Preset(
        "nvidia/OpenCodeInstruct",
        "cc-by-4.0",
        5_000_000,
        {"prompt": "input", "id": "id", "category": "domain"},
        config="train",
        note="Python tasks",
    ),
    "open-perfectblend": Preset(
        "mlabonne/open-perfectblend",
        "apache-2.0",
        1_420_000,
        {"conversations": "conversations", "category": "source"},
        note="chat, mathematics, code and instructions from eight sets, UltraChat among them",
    ),
    "nemotron": Preset(
        "nvidia/Nemotron-Post-Training-Dataset-v2",
        "see rows",
        627_720,
        {"messages": "messages", "id": "uuid", "category": "category"},
        split="chat",
        note="each row names its license; the set's conditions must be accepted on the hub",
        other_splits=("stem", "math", "code", *(f"multilingual_{code}" for code in ("ja", "de", "it", "es", "fr"))),
    ),
}


def list_presets() -> str:
    """Return the presets as a table."""
    lines = [f"{'preset':<19}{'rows':>10}  {'license':<12}{'split':<11}repository"]
    for name, preset in PRESETS.items():
        lines.append(f"{name:<19}{preset.rows:>10,}  {preset.license:<12}{preset.split:<11}{preset.repository}")
        if preset.other_splits:
            lines.append(f"{'':<19}{'':>10}  other splits: {', '.join(preset.other_splits)}")
        lines.append(f"{'':<19}{'':>10}  {preset.note}")
    return "\n".join(lines)

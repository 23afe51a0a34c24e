"""The sources of `synth prepare`: open them, and convert their rows to prompt rows without the source's replies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from contracts.prompt_files import PromptSet, Row, open_hub, open_prompts
from contracts.prompts import PROMPT_KEYS, PromptRow, parse_list, read_prompt_row
from recipe.prepare import SourceSection
from synth.presets import PRESETS
from synth.prompts import mark_places


@dataclass(frozen=True)
class Source:
    """An open source. `origin`: its file or repository; `columns`: by the key of a prompt row."""

    name: str
    origin: str
    license: str
    columns: Mapping[str, str]
    section: SourceSection
    prompts: PromptSet

    def rows(self) -> Iterator[Row]:
        """Yield the rows with their columns renamed to the keys of prompt rows."""
        if not self.columns:
            yield from self.prompts.rows()
            return
        for row in self.prompts.rows():
            value = row.value
            if isinstance(value, dict):
                value = {key: value[column] for key, column in self.columns.items() if column in value}
                if not {*PROMPT_KEYS} & {*value} and {*PROMPT_KEYS} & {*row.value}:
                    value = row.value  # a copy of a set that was converted already
            yield Row(row.index, row.where, value, row.error)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source."""
        section = self.section
        given = {key: getattr(section, key) for key in ("preset", "config", "split")}
        return {
            "name": self.name,
            "origin": self.origin,
            "license": self.license,
            **{key: value for key, value in given.items() if value is not None},
            "rows": self.prompts.num_rows,
            "sha256": self.prompts.checksum,
        }


def open_sources(sections: Sequence[SourceSection]) -> list[Source]:
    """Open all sources. Raises UserError for an unknown preset, a missing file, or a name twice."""
    sources = [_open(section, f"prepare.sources[{place}]") for place, section in enumerate(sections)]
    names = [source.name for source in sources]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(
                f"prepare.sources[{place}]", found=f"the name {name!r} twice", expected="one each", fix="Set `name`."
            )
    return sources


def _open(section: SourceSection, where: str) -> Source:
    if section.preset is not None and section.preset not in PRESETS:
        raise UserError(
            f"{where}.preset", found=section.preset, expected=f"one of {', '.join(PRESETS)}", fix="Correct it."
        )
    preset = PRESETS[section.preset] if section.preset is not None else None
    columns: Mapping[str, str] = preset.columns if preset else {}
    if section.columns is not None:
        columns = dict(section.columns.items())
    license_ = section.license or (preset.license if preset else "")
    name = section.name or section.preset or Path(str(section.path).split(":")[0]).stem
    if section.path is not None and (Path(section.path).exists() or not (section.config or section.split)):
        return Source(name, section.path, license_, columns, section, open_prompts(section.path))
    repository = section.path or (preset.repository if preset else "")
    config = section.config or (preset.config if preset else None)
    split = section.split or (preset.split if preset else "train")
    try:
        prompts = open_hub(repository, split, config)
    except LookupError as error:
        raise UserError(
            where,
            found=f"{repository}, which cannot be loaded ({error.args[0]})",
            expected="the set, on the hub or in its cache",
            fix="Set `path` to a local copy.",
        ) from None
    return Source(name, f"{repository}:{split}", license_, columns, section, prompts)


def read_row(row: Row) -> PromptRow:
    """Return a row's messages, those of the assistant without their text. Raises ValueError if it cannot be used.

    `synth generate` drops this text anyway: without it, the prompt set is a fraction as large.
    """
    if row.error:
        raise ValueError(row.error)
    found = read_prompt_row(row.value)
    mark_places(found.messages)  # refuses messages that the target cannot answer
    messages = [_strip(message) if message["role"] == "assistant" else message for message in found.messages]
    return PromptRow(found.id, found.category, messages, found.tools)


def _strip(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = {"tool_calls": parse_list(message["tool_calls"])} if message.get("tool_calls") else {}
    return {"role": "assistant", "content": "", **calls}

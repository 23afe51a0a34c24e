"""The recipe's `prepare` section: the sources of a prompt set, its limits, and what it must not overlap with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.section import Section, operational

Role = Literal["prompt", "messages", "conversations", "turns", "id", "category", "system", "tools"]
Cap = Annotated[int, Field(ge=0)]


class SourceSection(Section):
    """One source of prompts: a preset, a file, a folder, or a set of the hub."""

    preset: str | None = Field(
        default=None, description="a set by name, with its columns and license (`synth presets`)"
    )
    path: str | None = operational(
        default=None, description="file, folder, or name of the hub; with a preset: a local copy of it"
    )
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$", description="default: the preset's, or the file's")
    config: str | None = Field(default=None, description="config of a set of the hub; default: the preset's")
    split: str | None = Field(default=None, description="split of a set of the hub; default: the preset's, or train")
    columns: dict[Role, str] | None = Field(
        default=None, description="columns by the key of a prompt row that they hold; default: the preset's"
    )
    category: str | None = Field(default=None, description="category of rows without one; default: the source's name")
    license: str | None = Field(default=None, description="noted in the manifest; default: the preset's")
    weight: float = Field(default=1.0, gt=0, description="share of prepare.num_rows, relative to the other sources")
    max_rows: int | None = Field(default=None, gt=0, description="most rows of this source in the output")

    @model_validator(mode="after")
    def _names_its_rows(self) -> SourceSection:
        if self.preset is None and self.path is None:
            raise ValueError("a source names a preset or a path")
        return self


class PrepareSection(Section):
    sources: list[SourceSection] = Field(min_length=1, description="where the prompts come from")
    num_rows: int | None = Field(
        default=None, gt=0, description="rows of the output, shared by weight; default: all that are left"
    )
    max_per_category: dict[str, Cap] = Field(
        default={}, description='most rows of a category; "*": of each category that is not named'
    )
    max_per_language: dict[str, Cap] = Field(
        default={}, description='most rows of a language (ISO 639-1; und: not clear); "*": of each other one'
    )
    min_tokens: int = Field(default=0, ge=0, description="least tokens of a prompt, by the target's tokenizer")
    max_tokens: int | None = Field(
        default=None, gt=0, description="most tokens of a prompt, rendered with the target's chat template"
    )
    near_duplicates: float | None = Field(
        default=0.8, ge=0.5, le=1, description="similarity from which a row is a near-duplicate; null: keep them"
    )
    against: list[str] | None = Field(
        default=None,
        description="evaluation sets to keep out: names, NAME=FILE, files, folders; default: all that bench knows",
    )
    ngram: int = Field(default=13, ge=5, le=50, description="words in a row that make an overlap")
    seed: int = Field(default=0, description="of the draw and the order of the rows")

    @field_validator("max_per_category", "max_per_language", mode="before")
    @classmethod
    def _keys_are_text(cls, value: Any) -> Any:
        # YAML 1.1 reads the language `no` as false.
        return {"no" if key is False else key: cap for key, cap in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sources_are_told_apart(self) -> PrepareSection:
        if self.num_rows is None and any(source.weight != 1.0 for source in self.sources):
            raise ValueError("weights share num_rows among the sources: set prepare.num_rows")
        return self

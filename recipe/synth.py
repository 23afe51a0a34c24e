"""The recipe's `synth` section: thinking modes, sampling, retries and concurrency."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from common.section import operational
from recipe.retries import Retries

OF_TARGET = "default: the target's generation_config"


class SynthSection(Retries):
    thinking_modes: list[str] = Field(
        default=[], description='row i takes mode i modulo their number; "enabled:2" counts twice; []: no mode is sent'
    )
    temperature: float | list[float] | None = Field(
        default=None, description=f"several: one conversation each; {OF_TARGET}"
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description=OF_TARGET)
    top_k: int | None = Field(default=None, ge=-1, description=f"-1: off; {OF_TARGET}")
    min_p: float | None = Field(default=None, ge=0, le=1, description=OF_TARGET)
    repetition_penalty: float | None = Field(default=None, gt=0, description=OF_TARGET)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description=OF_TARGET)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description=OF_TARGET)
    max_tokens: int = Field(default=2048, gt=0, description="most tokens of one reply")
    num_samples: int = Field(default=1, gt=0, description="conversations per prompt and temperature")
    seed: int = Field(default=0, description="each conversation's seed follows from this and its id")
    supervise_end: bool = Field(default=True, description="whether the end-of-turn token is in the loss spans")
    output_format: Literal["oai", "sharegpt"] = Field(
        default="oai", description="form of the messages beside the token ids"
    )
    min_loop_tokens: int = Field(default=128, gt=0, description="repeating tokens from which a reply counts as a loop")
    tool_call_parser: str | None = Field(
        default=None,
        description="vLLM's parser of the target's tool calls, run on complete replies; default: that of "
        "serve.purposes.production, else by the chat template",
    )
    quotas: dict[Literal["thinking_mode", "category"], dict[str, NonNegativeInt]] = operational(
        default={},
        description="most finished conversations by thinking mode and by category of the prompt, as in "
        "{category: {math: 500}}; '*': all values that are not listed, which are not limited without it",
    )
    until_tokens: int | None = operational(
        default=None, gt=0, description="begin no conversation once the finished ones hold so many generated tokens"
    )
    endpoints: list[str] = operational(default=[], description="URLs of running servers; []: start one")
    draft: str | None = operational(
        default=None,
        description="folder of an exported or published draft, or a name of serve.heads: the server that we start "
        "drafts with it, which is faster and changes no greedy reply",
    )
    concurrency: int | None = operational(
        default=None, gt=0, description="conversations in flight; default: as many as the server keeps up with"
    )
    min_concurrency: int = operational(default=16, gt=0, description="lowest automatic concurrency")
    max_concurrency: int = operational(default=512, gt=0, description="highest automatic concurrency")
    drain_timeout_s: float = operational(
        default=20.0, ge=0, description="for conversations in flight at Ctrl-C, SIGTERM"
    )
    max_failed_fraction: float = operational(default=0.05, ge=0, le=1, description="above it the stage exits 1")
    max_failures_in_row: int = operational(default=50, gt=0, description="consecutive failures at which it exits 1")

    @field_validator("thinking_modes")
    @classmethod
    def _modes_have_weights(cls, modes: list[str]) -> list[str]:
        names = [_mode_and_weight(mode)[0] for mode in modes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is listed twice; write {name}:2 to have it twice as often")
        return modes

    @property
    def modes_in_turn(self) -> list[str]:
        """The modes that rows take in turn, each repeated by its weight."""
        return [name for name, weight in map(_mode_and_weight, self.thinking_modes) for _ in range(weight)]

    @field_validator("temperature")
    @classmethod
    def _temperatures_are_not_negative(cls, value: float | list[float] | None) -> float | list[float] | None:
        if value == [] or any(t < 0 for t in (value if isinstance(value, list) else [value or 0])):
            raise ValueError("temperature is a number from 0, or a list of numbers from 0")
        return value

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> SynthSection:
        if self.min_concurrency > self.max_concurrency:
            raise ValueError("min_concurrency is above max_concurrency")
        if self.draft is not None and self.endpoints:
            raise ValueError(
                "draft is for the server that synth starts: omit endpoints, or start theirs with the draft"
            )
        return self


def _mode_and_weight(text: str) -> tuple[str, int]:
    """Split `"enabled:2"` into ("enabled", 2); default weight 1. Raises ValueError for anything else."""
    name, separator, weight = text.partition(":")
    if not name.strip() or (separator and not (weight.isdecimal() and int(weight) > 0)):
        raise ValueError(f"{text!r} is neither a mode nor mode:weight with a whole weight above 0")
    return name.strip(), int(weight) if separator else 1

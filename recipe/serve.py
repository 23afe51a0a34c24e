"""The recipe's `serve` section: the engine, its flags by variant, hardware and purpose, and published drafts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from common.section import Section, operational
from contracts.schedule import SCHEDULE_KEY, check_schedule

Purpose = Literal["synth", "dump", "bench", "production"]
Args = dict[str, str | int | float | bool]
"""vLLM's flags without the dashes."""


def _check_schedule(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if isinstance(value, list) != (key == SCHEDULE_KEY):
            raise ValueError(f"{key}: {SCHEDULE_KEY} is a list of [first, last, draft tokens], and no other key is one")
    if SCHEDULE_KEY in values:
        check_schedule(values[SCHEDULE_KEY])
    return values


Speculative = Annotated[dict[str, str | int | float | bool | list[Any]], AfterValidator(_check_schedule)]
"""Keys of vLLM's speculative config."""


class VariantSection(Section):
    """The target in one precision."""

    path: str = Field(description="folder or hub name of the weights")
    memory_gb: float = Field(gt=0, description="GPU memory for weights and a minimal KV cache, in GB (1e9 bytes)")
    hardware: list[str] = Field(default=[], description="hardware that it runs on; []: any")
    args: Args = Field(default={}, description="over serve.args")
    env: dict[str, str] = operational(default={}, description="environment, over serve.env")
    speculative: Speculative = Field(default={}, description="over serve.speculative")


class PurposeSection(Section):
    """Flags and environment of the servers of one purpose."""

    args: Args = Field(default={}, description="flags without the dashes, over the variant's")
    env: dict[str, str] = operational(default={}, description="environment, over the variant's")


class HeadSection(Section):
    """A published draft."""

    path: str = Field(description="folder or hub name")
    method: str = Field(description="vLLM's name of the method")
    num_speculative_tokens: int = Field(gt=0, description="draft tokens per step")


class ServeSection(Section):
    host: str = operational(default="127.0.0.1", description="address that servers listen on")
    port: int | None = operational(default=None, ge=1, le=65535, description="port of the server; default: a free one")
    startup_timeout_s: float = operational(
        default=600.0, gt=0, description="how long to wait for a server to be healthy"
    )
    env: dict[str, str] = operational(default={}, description="environment of every vLLM process")
    backend: Literal["vllm", "sglang"] = Field(default="vllm", description="engine of synthesis; all else uses vllm")
    args: Args = Field(default={}, description="vLLM's flags without the dashes")
    sglang_args: Args = Field(default={}, description="SGLang's flags without the dashes")
    speculative: Speculative = Field(
        default={},
        description="added to the speculative config of every draft; K by batch size: docs/schedule.md",
    )
    variant: str | None = Field(default=None, description="one of serve.variants; default: target.path itself")
    hardware: str | None = Field(default=None, description="the node: h100, h200, b200, b300, gb200, gb300 or mi355x")
    variants: dict[str, VariantSection] = Field(default={}, description="precisions of the target, by name")
    purposes: dict[Purpose, PurposeSection] = Field(
        default={}, description="over the variant's flags; those of a dump are dump.args"
    )
    heads: dict[str, HeadSection] = operational(default={}, description="published drafts, by the name for --draft")
    image: str = operational(default="vllm/vllm-openai:v0.32.0", description="for `serve command --format docker`")

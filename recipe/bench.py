"""The recipe's `bench` section: concurrencies, the search space of serving sweeps, and the accuracy tasks."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from common.section import Section, operational


class LayoutSpace(Section):
    """A layout of the target on its GPUs, and its concurrencies: doubled from conc_start to conc_end, inclusive."""

    tp: int = Field(default=1, gt=0, description="tensor parallel size")
    ep: int = Field(default=1, gt=0, description="expert parallel size: 1 or tp")
    dp_attn: bool = Field(default=False, description="data-parallel attention in tp replicas, experts over all GPUs")
    conc_start: int = Field(gt=0, description="lowest number of requests in flight")
    conc_end: int = Field(gt=0, description="highest number of requests in flight")

    @model_validator(mode="after")
    def _layout_is_possible(self) -> LayoutSpace:
        if self.ep not in (1, self.tp):
            raise ValueError(f"ep is 1 or tp ({self.tp}): vLLM spreads experts over all GPUs or none")
        if self.dp_attn and self.ep == 1:
            raise ValueError("dp_attn needs ep = tp > 1: the experts are spread over all replicas")
        if self.conc_end < self.conc_start:
            raise ValueError("conc_end is below conc_start")
        return self

    @property
    def concurrencies(self) -> list[int]:
        """conc_start, its doubles below conc_end, and conc_end."""
        doubles = [self.conc_start]
        while doubles[-1] < self.conc_end:
            doubles.append(min(2 * doubles[-1], self.conc_end))
        return doubles


class ScenarioSection(Section):
    """Input and output lengths of requests, and the layouts to measure."""

    isl: int = Field(gt=0, description="maximum input length, tokens")
    osl: int = Field(gt=0, description="maximum output length, tokens")
    search_space: list[LayoutSpace] = Field(min_length=1, description="layouts, and the concurrencies of each")


class SweepSection(Section):
    scenarios: list[ScenarioSection] = operational(default=[], description="finished points are kept if this changes")
    range_ratio: float = Field(
        default=0.8, gt=0, le=1, description="lengths are uniform between this share of isl (or osl) and all of it"
    )
    dataset: str = Field(
        default="random", description="random tokens, or a JSONL of prompts (rows with prompt, turns or messages)"
    )
    ignore_eos: bool = Field(default=True, description="generate up to osl; false: stop at the end token")
    seed: int = Field(default=0, description="of the prompts and their lengths")


OF_TARGET = "of sampled answers; default: the target's generation_config"


class AccuracySection(Section):
    """Tasks of lm-eval, and how their questions are asked. Tasks and repeats may be added to a finished output."""

    tasks: list[str] = operational(
        default=["gsm8k"], min_length=1, description="tasks or groups of lm-eval, or those of include_path"
    )
    include_path: Path | None = operational(
        default=None, description="folder with task files (YAML); its files must stay as they are"
    )
    limit: int | None = Field(default=None, gt=0, description="only the first questions of each task")
    num_fewshot: int | None = Field(default=None, ge=0, description="default: the task's own")
    repeats: int = operational(default=4, ge=0, description="sampled answers per question; 0: greedy answers only")
    temperature: float | None = Field(default=None, gt=0, description=f"{OF_TARGET}, else 1")
    top_p: float | None = Field(default=None, gt=0, le=1, description=OF_TARGET)
    top_k: int | None = Field(default=None, ge=-1, description=f"{OF_TARGET}; -1: off")
    max_tokens: int | None = Field(
        default=None, gt=0, description="most tokens of an answer; default: synth.max_tokens"
    )
    thinking_mode: str | None = Field(
        default=None, description='default: the first of synth.thinking_modes; "": no mode is sent'
    )
    seed: int = Field(default=0, description="each request's seed follows from this and its prompt")
    concurrency: int | None = operational(
        default=None, gt=0, description="requests in flight; default: the highest of bench.concurrency"
    )
    confidence: float = operational(
        default=0.99, ge=0.5, lt=1, description="with which a run without a real difference passes"
    )


class BenchSection(Section):
    concurrency: list[PositiveInt] = Field(default=[1, 8], min_length=1, description="requests in flight")
    num_prompts: dict[int, PositiveInt] = Field(default={}, description="by concurrency: only the first n prompts")
    sweep: SweepSection = operational(default=SweepSection(), description="for `bench plan` and `bench sweep`")
    accuracy: AccuracySection = operational(default=AccuracySection(), description="for `bench accuracy`")

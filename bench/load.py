"""Run one load on a running server with vLLM's load generator (`vllm bench serve`) and read its figures.

Reads:  a file of prompt rows (contracts/prompts.py), if the recipe names one.
Writes: the prompts in the generator's format; the generator's output to a log.

Lengths: vLLM draws them from [x(1-q), x(1+q)] around a mean x. InferenceMAX's range ratio r means uniform in [r*n, n]
for a size n. So x = n(1+r)/2 and q = (1-r)/(1+r), both rounded down: no length exceeds n.

Random tokens are sent as chat messages. Prompts of a file are rendered here with the target's chat template, up to
their first user turn, and sent as text, because vLLM's generator has no system message. The choice of prompts matters:
a draft gains most on data like its training data, and next to nothing on random tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.plan import Point
from common.errors import IncompleteError, UserError
from common.files import read_json, write_atomic
from common.progress import wait_for
from contracts.acceptance import Acceptance
from contracts.prompt_files import Row, open_prompts
from contracts.prompts import read_opening
from recipe.bench import SweepSection
from recipe.recipe import Recipe
from serve.command import MODEL_NAME
from serve.engine import engine_env
from serve.flags import to_flags
from serve.server import find_error
from serve.vllm_main import PARENT_ENV
from target.target import Target
from target.templates import rendering_template

LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 95, 99)


def run_load(
    recipe: Recipe, target: Target, point: Point, url: str, prompts: Path | None, path: Path
) -> dict[str, Any]:
    """Run the load of `point` on the server at `url`; return the result without per-request lists.

    Greedy (temperature 0). The generator's output goes to .log beside `path`. Raises IncompleteError without a result.
    """
    result, log = path.with_suffix(".raw"), path.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    args = ["bench", "serve", *to_flags(load_flags(recipe.bench.sweep, target, point, url, prompts, result))]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.vllm_main", *args],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **engine_env(recipe.serve.env), PARENT_ENV: str(os.getpid())},
        )
        load = f"{point.scenario} {point.layout.name}, {point.concurrency} at a time, {point.num_prompts} requests"
        code = wait_for(process, f"bench: {load}")
    if code or not result.exists():
        raise IncompleteError(f"{log}: the load ended with code {code}: {find_error(log)}")
    raw = read_json(result, "a result of vLLM's load generator")
    result.unlink()
    per_request = ("latencies", "queue_times")
    return {key: value for key, value in raw.items() if key not in per_request}


def load_flags(
    sweep: SweepSection, target: Target, point: Point, url: str, prompts: Path | None, result: Path
) -> dict[str, Any]:
    """Return the flags of `vllm bench serve`, without the dashes."""
    if prompts is None:
        source: dict[str, Any] = {
            "backend": "openai-chat",
            "endpoint": "/v1/chat/completions",
            "dataset-name": "random",
            "random-input-len": mean_length(point.isl, sweep.range_ratio),
            "random-output-len": mean_length(point.osl, sweep.range_ratio),
            "random-range-ratio": spread(sweep.range_ratio),
        }
    else:
        source = {
            "backend": "openai",
            "endpoint": "/v1/completions",
            "dataset-name": "custom",
            "dataset-path": prompts,
            "custom-output-len": -1,  # each row's own
            "skip-chat-template": True,  # the rows are rendered already
            "extra-body": json.dumps({"add_special_tokens": False}),
        }
    return {
        "base-url": url,
        "model": target.path,
        "served-model-name": MODEL_NAME,
        **source,
        **({"ignore-eos": True} if sweep.ignore_eos else {}),
        "num-prompts": point.num_prompts,
        "max-concurrency": point.concurrency,
        "num-warmups": point.num_warmups,
        "temperature": 0,
        "seed": sweep.seed,
        "percentile-metrics": ",".join(LATENCIES),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "save-result": True,
        "result-dir": result.parent,
        "result-filename": result.name,
        "disable-tqdm": True,
    }


def mean_length(size: int, range_ratio: float) -> int:
    """Return the mean of lengths that are uniform in [range_ratio * size, size] (tokens), rounded down."""
    return max(1, math.floor(size * (1 + range_ratio) / 2))


def spread(range_ratio: float) -> float:
    """Convert InferenceMAX's range ratio (relative to the size) to vLLM's (relative to the mean)."""
    return math.floor(1e6 * (1 - range_ratio) / (1 + range_ratio)) / 1e6


def write_prompts(recipe: Recipe, target: Target, point: Point, path: Path) -> tuple[int, int]:
    """Write the recipe's prompts as `{prompt, output_tokens}` for the sizes of `point`; return `(written, left out)`.

    Prompts of more than `isl` tokens are left out. Raises UserError for a row without a prompt, or if none is left.
    """
    from transformers import AutoTokenizer

    sweep, source = recipe.bench.sweep, Path(recipe.bench.sweep.dataset)
    tokenizer = AutoTokenizer.from_pretrained(target.path)
    template = rendering_template(recipe.target, target)
    draw = random.Random(sweep.seed)
    lines, left_out = [], 0
    for row in open_prompts(source).rows():
        text = tokenizer.apply_chat_template(
            read_opening_row(row), chat_template=template, add_generation_prompt=True, tokenize=False
        )
        if len(tokenizer(text, add_special_tokens=False).input_ids) > point.isl:
            left_out += 1
            continue
        output_tokens = draw.randint(math.ceil(point.osl * sweep.range_ratio), point.osl)
        lines.append(json.dumps({"prompt": text, "output_tokens": output_tokens}) + "\n")
    if not lines:
        raise UserError(
            source, found=f"no prompt of at most {point.isl} tokens", expected="some", fix="Raise isl, or take others."
        )
    write_atomic(path, "".join(lines))
    return len(lines), left_out


def read_opening_row(row: Row) -> list[dict[str, Any]]:
    """Return a row's messages up to its first user turn. Raises UserError if it has none."""
    try:
        if row.error:
            raise ValueError(row.error)
        return read_opening(row.value)
    except ValueError as error:
        raise UserError(
            row.where, found=str(error), expected="messages, turns or prompt", fix="Fix or delete the row."
        ) from None


def read_figures(raw: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Compute figures from the generator's result: latencies in ms, speeds in tokens/s, acceptance.

    Tokens/s per user is 1000 / the median time per output token (ms). Warm-up requests are not counted.
    """
    median_tpot = float(raw["median_tpot_ms"])
    names = {"mean": "mean_{}_ms", **{f"p{p}": f"p{p}_{{}}_ms" for p in PERCENTILES}}
    return {
        "completed": raw["completed"],
        "failed": raw["failed"],
        "seconds": round(raw["duration"], 3),
        "input_tokens": raw["total_input_tokens"],
        "output_tokens": raw["total_output_tokens"],
        "output_tokens_per_s": round(raw["output_throughput"], 2),
        "total_tokens_per_s": round(raw["total_token_throughput"], 2),
        "tokens_per_s_per_user": round(1000 / median_tpot, 2) if median_tpot else None,
        "tokens_per_s_per_gpu": round(raw["total_token_throughput"] / point.layout.num_gpus, 2),
        "latency_ms": {
            latency: {name: round(float(raw[key.format(latency)]), 3) for name, key in names.items()}
            for latency in LATENCIES
        },
        "acceptance": read_acceptance(raw),
    }


def read_acceptance(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compute acceptance from vLLM's counters over the load; return None if the server does not draft.

    Steps that accepted exactly i tokens are those that accepted at least i minus those that accepted at least i + 1.
    Tokens that the last step accepted beyond the end of a reply are included.
    """
    steps = raw.get("spec_decode_num_drafts")
    if not steps:
        return None
    at_least = [steps, *(round(share * steps) for share in raw["spec_decode_per_position_acceptance_rates"]), 0]
    histogram = [more - less for more, less in itertools.pairwise(at_least)]
    drafted, accepted = raw["spec_decode_draft_tokens"], raw["spec_decode_accepted_tokens"]
    summary = Acceptance(tuple(histogram)).summary()
    return {**summary, "accepted": accepted, "drafted": drafted, "acceptance_rate": round(accepted / drafted, 4)}

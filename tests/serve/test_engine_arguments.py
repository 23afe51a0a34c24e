"""Claims about arguments of vLLM: the installed vLLM knows every one that a recipe or our code sets.

Those of SGLang are not checked: it is not installed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from vllm_parser import Question, ask_vllm

from bench.load import load_flags
from bench.plan import Layout, Point
from common.redact import REDACTED
from contracts.schedule import SCHEDULE_KEY
from recipe.load import load_recipe
from recipe.recipe import Recipe
from serve.command import Serving, build_command
from serve.engine import COMMON_ENV, CPU_ENV
from serve.extraction import extraction_args, to_server_args
from serve.flags import Sizes, speculative_overrides, to_flags
from serve.trace import trace_args
from target.layers import captured_layers
from target.target import Target

pytestmark = pytest.mark.vllm

PURPOSES = (None, "synth", "dump", "bench", "production")
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
OURS = {"VLLM_SERVE_EXTRA_ARGS"}
"""Variables of worker.sh."""
OF_OTHERS = {"HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
"""Variables of libraries that have no table of them: checked against their documentation by hand."""


@pytest.fixture(autouse=True)
def _in_the_projects_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read_recipes(target_folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Every shipped recipe with every variant of its target; one that makes its target first gets the tests' own."""
    for path in RECIPES:
        recipe = load_recipe(path)
        own = [] if recipe.target.facts else [f"target.path={target_folder}", "target.num_aux_layers=2"]
        for variant in (None, *recipe.serve.variants):
            sets = [*own, *([f"serve.variant={variant}"] if variant else [])]
            yield f"{path.relative_to(ROOT)} {variant}", load_recipe(path, sets)


def set_variables(recipe: Recipe) -> dict[str, str]:
    serve = recipe.serve
    sections = [serve, recipe.dump, *serve.variants.values(), *serve.purposes.values()]
    values = {name: value for section in sections for name, value in section.env.items()}
    return {**COMMON_ENV, **CPU_ENV, **{name: value for name, value in values.items() if value != REDACTED}}


def ask_about(recipe: Recipe, folder: Path) -> Iterator[Question]:
    """What our code gives to vLLM for a recipe: servers, engines in a process, loads, environment variables."""
    target = Target.of(recipe.target)
    extraction = extraction_args(recipe, target, captured_layers(recipe.target, target), folder)
    sizes = Sizes(isl=1024, osl=128, concurrency=4)
    # worker.sh and count_gpus count GPUs by these names.
    parallel = {**Layout(tp=2, ep=2, dp_attn=True).flags, "pipeline-parallel-size": 2}
    for purpose in PURPOSES:
        more: list[Mapping[str, Any]] = [{}, parallel]
        more += [to_server_args(extraction)] if purpose == "dump" else []
        for extra_args in more:
            serving = Serving(purpose=purpose, sizes=sizes, extra_args=extra_args)  # type: ignore[arg-type]
            yield build_command(recipe, target, port=1, serving=serving).args
    yield {"EngineArgs": extraction}
    yield {"KVTransferConfig": extraction["kv_transfer_config"]}
    yield {"SpeculativeConfig": extraction["speculative_config"]}
    yield {"EngineArgs": trace_args(recipe, {})}
    for head in recipe.serve.heads.values():
        yield {"SpeculativeConfig": {**head.model_dump(exclude={"path"}), "model": head.path}}
    yield {"SpeculativeConfig": speculative_overrides(recipe.serve)}
    yield {"SpeculativeConfig": {SCHEDULE_KEY: [[1, 4, 0]], "rejection_sample_method": "synthetic"}}
    yield {"SpeculativeConfig": {"synthetic_acceptance_rates": [0.5]}}  # of `bench schedule`, as the line before
    for prompts in (None, folder / "prompts.jsonl"):
        flags = load_flags(recipe.bench.sweep, target, Point(Layout(tp=1), 64, 8, 2), "http://h", prompts, folder / "r")
        yield ["bench", *to_flags(flags)]
    yield {"environ": {name: value for name, value in set_variables(recipe).items() if name not in OF_OTHERS}}


def test_vllm_knows_every_argument_and_variable_of_every_recipe(target_folder: Path, tmp_path: Path) -> None:
    asked = [(name, q) for name, recipe in read_recipes(target_folder) for q in ask_about(recipe, tmp_path)]
    assert len({name.split()[0] for name, _ in asked}) == len(RECIPES) >= 4
    answers = ask_vllm([question for _, question in asked])
    complaints = [
        f"{name}: {answer} {json.dumps(question)}"
        for (name, question), answer in zip(asked, answers, strict=True)
        if answer != "ok"
    ]
    assert not complaints, "\n".join(complaints)


def test_what_vllm_does_not_know_is_found() -> None:
    questions: list[Question] = [
        ["serve", "model", "--no-such-flag"], ["serve", "model", "--block-size", "many"], ["bench", "--no-such-flag"],
        {"EngineArgs": {"enable_auto_tool_choice": True}}, {"SpeculativeConfig": {"num_tokens": 3}},
        {"environ": {"VLLM_RPC_TIMEOUT": "1800000"}}, {"environ": {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1800 s"}},
    ]  # fmt: skip
    assert [answer == "ok" for answer in ask_vllm(questions)] == [False] * len(questions)


def test_every_variable_of_vllm_that_the_project_names_exists() -> None:
    """Also those that only a script, a benchmark or a page of the documentation names."""
    places: dict[str, set[str]] = {}
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.suffix not in (".py", ".sh", ".yaml", ".md", ".toml") or inside[0] in (
            ".venv",
            "runs",
            "tests",
            "build",
        ):
            continue
        for name in re.findall(r"\bVLLM_[A-Z0-9_]*[A-Z0-9]\b", path.read_text()):
            places.setdefault(name, set()).add("/".join(inside))
    assert "VLLM_LOGGING_LEVEL" in places  # the scan finds something
    names = sorted(places.keys() - OURS)
    answers = ask_vllm([{"environ": {name: "1"}} for name in names])
    unknown = {name: places[name] for name, answer in zip(names, answers, strict=True) if "KeyError" in answer}
    assert not unknown

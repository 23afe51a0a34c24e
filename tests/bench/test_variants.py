"""Claims about serving a comparison's drafts: the best one by its own baseline, paired gains, and none if none pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.requests import Answer, answers_to_json
from bench.speeds import find_speeds
from bench.variants import Variant, make_tables, print_result, serve_variants, summarize
from common.errors import UserError
from recipe.recipe import Recipe

TOKENS = 11  # of each reply: one of the prefill and ten of steps


def make_run(accepted: list[int], seconds: float) -> dict[str, Any]:
    """A server's file: two equal replies at concurrency 1, which take these seconds."""
    answers = [Answer(f"{name}-0-1", list(range(TOKENS)), "stop", accepted, 1.0) for name in "ab"]
    return {"points": {"1": {"seconds": seconds, "tokens": 2 * TOKENS, "answers": answers_to_json(answers)}}}


def make_variant(folder: Path, name: str, base_s: float, seconds: float) -> Variant:
    """A served draft of three draft tokens that accepts 1.5 a step."""
    runs = {0: make_run([], base_s), 3: make_run([3, 2, 1, 0], seconds)}
    (folder / name).mkdir()
    (folder / name / "baseline.json").write_text(json.dumps(runs[0]))
    (folder / name / "draft-k3.json").write_text(json.dumps(runs[3]))
    report = {
        "speeds": [at.model_dump(mode="json") for at in find_speeds(runs)], "by_draft_tokens": {"3": {}},
        "acceptance_length": 2.5, "num_draft_tokens": 3, "greedy_identical": 2, "greedy_total": 2,
    }  # fmt: skip
    (folder / name / "acceptance.json").write_text(json.dumps(report))
    return Variant(name, {"acceptance_length": 2.4}, folder / name)


def test_the_best_draft_is_that_with_the_largest_gain_over_its_own_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The machine was twice as slow for the second draft and its baseline.
    variants = [make_variant(tmp_path, "dflash", 2.2, 1.1), make_variant(tmp_path, "dspark", 4.4, 1.76)]
    result = summarize(variants)
    (point,) = result["points"]
    assert (point["concurrency"], point["best"]) == (1, "dspark")
    first, second = point["variants"]
    assert (first["speed_up"], first["gain"], first["gain_interval"]) == (2.0, 0.0, [0.0, 0.0])
    assert (second["speed_up"], second["gain"]) == (2.5, 0.25)
    assert second["gain_interval"] == pytest.approx([0.25, 0.25])
    assert (second["baseline_tokens_per_s"], second["tokens_per_s"]) == (5.0, 12.5)
    # 200 ms a token without the draft; 2.5 tokens in a step of 200 ms with it.
    assert (first["step_ms"], first["draft_and_check_ms"]) == (125.0, 25.0)
    assert (second["step_ms"], second["draft_and_check_ms"]) == (200.0, 0.0)
    tables = make_tables(result)
    assert tables["accepted"].rows[0] == ("dflash", 3, "2.400", "2.500", "2 of 2")
    print_result(result)
    assert "concurrency 1, best: dspark" in capsys.readouterr().out


def test_drafts_that_are_slower_than_none_are_not_called_the_best(tmp_path: Path) -> None:
    (point,) = summarize([make_variant(tmp_path, "dflash", 2.2, 4.4)])["points"]
    assert point["best"] is None
    assert point["variants"][0]["speed_up"] == 0.5


def test_a_variant_that_the_comparison_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"variants": [{"name": "dflash"}]}))
    with pytest.raises(UserError, match="--variant: found eagle3, expected one of dflash"):
        serve_variants(Recipe.model_construct(), tmp_path, tmp_path, ["eagle3"])

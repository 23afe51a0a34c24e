"""Claims about quotas and the budget of tokens: met in the finished conversations, exactly once, whatever is killed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import scripted
from conftest import kill_when, read_lines, run_here

from recipe.load import load_recipe

QUOTAS = "synth.quotas={thinking_mode: {enabled: 12, disabled: 6}, category: {math: 10, '*': 8}}"


def write_prompts(path: Path, count: int, endless_every: int = 5) -> Path:
    """Rows in three categories; some replies reach max_tokens, which leaves them unfinished."""
    rows = [
        {"id": f"row-{n}", "category": ("math", "code", "chat")[n // 2 % 3],
         "turns": [f"{'endless' if n % endless_every == 0 else 'question'} {n}"]}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(recipe: Path, prompts: Path, output: Path, *more: object, check: bool = True) -> Any:
    args = ("--recipe", recipe, "--prompts", prompts, "--output", output, "--thinking-modes", "enabled,disabled")
    return run_here("synth", "generate", *args, *more, check=check)


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text())["summary"])


def finished(folder: Path) -> list[dict[str, Any]]:
    """The finished records; every record is there once, and its ledger line, too."""
    ledger = read_lines(folder / "ledger.jsonl")
    records = read_lines(folder / "conversations.jsonl")
    assert len({record["id"] for record in records}) == len(records)
    assert {line["id"] for line in ledger if "end" in line} == {record["id"] for record in records}
    return [record for record in records if record["finish_reason"] == "stop"]


def tokens_of(records: list[dict[str, Any]]) -> int:
    return sum(record["usage"]["completion_tokens"] for record in records)


def test_quotas_are_met_exactly_in_the_finished_conversations(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 120)
    args = (recipe_path, prompts, tmp_path / "run", "--endpoint", server.url, "--set", QUOTAS)
    generate(*args)
    records = finished(tmp_path / "run")
    assert Counter(record["thinking_mode"] for record in records) == {"enabled": 12, "disabled": 6}
    assert Counter(record["category"] == "math" for record in records) == {True: 10, False: 8}
    found = summary_of(tmp_path / "run")
    assert found["truncated"] > 0  # they count for no quota
    assert found["done"] + found["truncated"] + found["unreached"] == found["input"] == 120
    assert found["unreached"] > 60  # the rest of the input was left alone
    num_requests = len(server.requests)
    assert "is finished, skipped" in generate(*args).stdout
    larger = QUOTAS.replace("disabled: 6", "disabled: 9").replace("'*': 8", "'*': 11")
    generate(*args[:-1], larger)
    records = finished(tmp_path / "run")
    assert Counter(record["thinking_mode"] for record in records) == {"enabled": 12, "disabled": 9}
    assert (
        len(server.requests) - num_requests
        == len(read_lines(tmp_path / "run/ledger.jsonl")) - found["done"] - found["truncated"]
    )


def test_a_row_that_was_left_out_takes_the_place_of_one_that_did_not_end_well(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    # All are in flight at once when the first, which are cut off, have filled the quota: the others are left out first.
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12, endless_every=1)
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([*lines[:6], *(line.replace("endless", "slow") for line in lines[6:])]) + "\n")
    quotas = "synth.quotas={category: {math: 2, code: 2, chat: 2}}"
    generate(recipe_path, prompts, tmp_path / "run", "--endpoint", server.url, "--set", quotas)
    assert Counter(record["category"] for record in finished(tmp_path / "run")) == {"math": 2, "code": 2, "chat": 2}


def test_quotas_that_the_input_cannot_fill_are_named_and_every_row_is_tried(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    quotas = "synth.quotas={category: {math: 100, code: 1}}"
    said = generate(recipe_path, prompts, tmp_path / "run", "--endpoint", server.url, "--set", quotas).stdout
    by_category = Counter(record["category"] for record in finished(tmp_path / "run"))
    assert by_category["code"] == 1
    assert f"too few rows for its quotas: math {by_category['math']} of 100" in said
    shown = run_here("synth", "stats", tmp_path / "run").stdout
    lines = {line.split("  ")[0]: line.split()[-4:] for line in shown.splitlines()}
    assert lines["category math, quota"] == ["100", str(by_category["math"]), str(100 - by_category["math"]), "short"]
    assert lines["category code, quota"][-2:] == ["1", "1"]
    assert lines["thinking mode enabled, share"][-2] == "50.0%"


def test_a_budget_of_tokens_ends_a_run_and_a_larger_one_goes_on(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 120)
    args = (recipe_path, prompts, tmp_path / "run", "--endpoint", server.url, "--concurrency", "4")
    for budget in (300, 900):
        generate(*args, "--until-tokens", str(budget))
        records = finished(tmp_path / "run")
        # Rows are begun in order, and only what was in flight comes after the budget.
        assert budget <= tokens_of(records) < budget + 5 * 40
        ledger = read_lines(tmp_path / "run/ledger.jsonl")
        assert sorted(line["index"] for line in ledger) == list(range(len(ledger)))
        assert summary_of(tmp_path / "run")["unreached"] == 120 - len(ledger)
    num_requests = len(server.requests)
    assert "is finished, skipped" in generate(*args, "--until-tokens", "900").stdout
    assert len(server.requests) == num_requests
    generate(*args)
    assert "unreached" not in summary_of(tmp_path / "run")
    assert len(read_lines(tmp_path / "run/ledger.jsonl")) == 120


def test_shards_divide_quotas_and_budget_among_them(recipe_path: Path, tmp_path: Path, server: scripted.Server) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 240)
    output = tmp_path / "run"
    quotas = "synth.quotas={category: {math: 11, code: 7}}"
    for number in range(3):
        args = ("--endpoint", server.url, "--set", quotas, "--until-tokens", "1500", "--concurrency", "2")
        generate(recipe_path, prompts, output, *args, "--shard", f"{number}/3")
    run_here("synth", "merge", output)
    records, found = finished(output), summary_of(output)
    by_category = Counter(record["category"] for record in records)
    assert by_category["math"] <= 11
    assert by_category["code"] <= 7
    assert 1500 <= tokens_of(records) < 1500 + 3 * 3 * 40
    assert found["done"] + found["truncated"] + found["unreached"] == 240
    assert "code, quota" in run_here("synth", "stats", output).stdout


def test_after_a_kill_quotas_and_budget_are_met_exactly_once(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 400)
    output = tmp_path / "run"
    quotas = "synth.quotas={thinking_mode: {enabled: 40, disabled: 20}}"
    args = ("--recipe", recipe_path, "--prompts", prompts, "--output", output, "--thinking-modes", "enabled,disabled",
            "--endpoint", server.url, "--set", quotas, "--set", "synth.concurrency=2")  # fmt: skip
    ledger = output / "ledger.jsonl"
    assert kill_when(lambda: len(read_lines(ledger)) >= 10, "synth", "generate", *args) == -9
    assert len(read_lines(ledger)) < 80
    run_here("synth", "generate", *args)
    assert Counter(record["thinking_mode"] for record in finished(output)) == {"enabled": 40, "disabled": 20}
    found = summary_of(output)
    assert found["done"] + found["truncated"] + found["unreached"] == 400


@pytest.mark.parametrize("wrong", ["{mood: {good: 1}}", "{category: {math: -1}}", "{category: 5}"])
def test_a_wrong_quota_is_one_line(recipe_path: Path, tmp_path: Path, wrong: str) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    result = generate(recipe_path, prompts, tmp_path / "run", "--set", f"synth.quotas={wrong}", check=False)
    assert result.returncode == 2
    assert "synth.quotas" in result.stderr


def test_quotas_and_budget_may_change_in_a_resume(recipe_path: Path) -> None:
    settings = load_recipe(recipe_path, ["synth.quotas={category: {a: 1}}", "synth.until_tokens=5"]).synth.settings()
    assert not {"quotas", "until_tokens"} & settings.keys()

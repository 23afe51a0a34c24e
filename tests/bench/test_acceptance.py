"""Claims about acceptance over prompt sets: every reply is counted once, whatever is summed; and a run goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, command, run, run_here
from written import write_store

from bench.acceptance_report import make_tables, summarize
from bench.draft_tokens import parse_draft_tokens
from bench.requests import Answer, Turn, answers_to_json
from bench.track import figures_of_prompts
from common.errors import UserError
from contracts.acceptance import Acceptance
from target.target import Target


def make_turn(id_: str, category: str, mode: str = "on", dataset: str = "a") -> Turn:
    return Turn(f"{id_}-0-1", mode, category, [1], [2], dataset=dataset)


def make_group(answers: list[Answer], dataset: str = "a", mode: str = "on") -> dict[str, Any]:
    steps = [a for answer in answers for a in answer.accepted]
    counters = {"num_drafts": float(len(steps)), "num_accepted_tokens": float(sum(steps))}
    return {
        "dataset": dataset, "thinking_mode": mode, "temperature": 0.0, "per_request": True, "compared": True,
        "answers": answers_to_json(answers), "counters": counters, "greedy_identical": len(answers), "differing": [],
    }  # fmt: skip


def test_rows_add_up_to_what_was_counted_and_loops_stand_apart() -> None:
    turns = [make_turn("w", "x"), make_turn("v", "x"), make_turn("u", "y"), make_turn("t", "y", "off", "b")]
    looping = [7, *([3, 4] * 80)]
    answers = [
        Answer("w-0-1", [1, 2, 3, 4, 9], "stop", [2, 0], 0.1),  # 1 + 3 + 1
        Answer("v-0-1", [1, 2, 3, 9], "stop", [1, 0], 0.1),
        Answer("u-0-1", looping, "length", [3] * 40, 0.1),
        Answer("t-0-1", [1, 2, 9], "stop", [0, 0], 0.1),
    ]
    groups = [make_group(answers[:3]), make_group(answers[3:], "b", "off")]
    report = summarize(turns, {3: groups}, {9}, loop_tokens=32)
    rows = {(row["category"], row["thinking_mode"]): row for row in report["rows"]}
    assert rows["x", "on"]["histogram"] == [2, 1, 1, 0]
    assert (rows["x", "on"]["n"], rows["y", "on"]["n"], rows["y", "on"]["looping"]) == (2, 0, 1)
    pooled = report["pooled"]["3"]
    parts = [Acceptance(tuple(row["histogram"])) for row in report["rows"]]
    assert pooled["histogram"] == list(Acceptance.pool(parts).histogram) == [4, 1, 1, 0]
    assert pooled["steps"] + pooled["looping"]["steps"] == pooled["counters"]["num_drafts"]
    assert pooled["accepted"] + pooled["looping"]["accepted"] == pooled["counters"]["num_accepted_tokens"]
    assert pooled["macro_acceptance_length"] == pytest.approx((1 + 3 / 4 + 1) / 2)  # of the rows that have steps
    assert [entry["steps"] for entry in report["by_mode"]] == [2, 4]
    assert report["overruns"] == {"3": []}
    tracked = figures_of_prompts(report)
    assert tracked["k3/all/acceptance_length"] == pooled["acceptance_length"]
    assert tracked["k3/a/x/on/t0/acceptance_length"] == rows["x", "on"]["acceptance_length"] == 1.75
    table = make_tables(report)
    assert "| x | a | 2 | 1.750" in table
    assert "| looping, not included | all | 1 | 4.000 | 100.0% |" in table


def test_a_server_that_tells_only_its_counters_gives_a_row_for_the_whole_set() -> None:
    turns = [make_turn("w", "x"), make_turn("v", "y")]
    answers = [Answer(turn.id, [1, 2, 9], "stop", [], 0.1) for turn in turns]
    counters = {"num_drafts": 4.0, "num_accepted_tokens": 5.0, "accepted_at_0": 3.0, "accepted_at_1": 2.0}
    report = summarize(turns, {3: [{**make_group(answers), "per_request": False, "counters": counters}]}, {9}, 32)
    (row,) = report["rows"]
    assert (row["category"], row["n"], row["histogram"]) == ("(all)", 2, [1, 1, 2, 0])
    assert row["acceptance_length"] == 1 + 5 / 4
    assert "| (all) | a | 2 | 2.250 |" in make_tables(report)


@pytest.mark.parametrize(("text", "numbers"), [("1-4", [1, 2, 3, 4]), ("3,7", [3, 7]), ("5", [5]), (None, None)])
def test_draft_tokens_are_numbers_or_ranges(text: str | None, numbers: list[int] | None) -> None:
    assert parse_draft_tokens(text) == numbers


def test_draft_tokens_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="1-7 or 3,7"):
        parse_draft_tokens("all")
    with pytest.raises(UserError, match="smaller number first"):
        parse_draft_tokens("7-1")


def start_server(args: list[object], folder: Path) -> subprocess.Popen[str]:
    """`serve start` with the draft, which prints its URL when it is healthy."""
    words = command("serve", "start", *args, "--draft", folder / "export", "--log", folder / "server.log")
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.vllm
@pytest.mark.proves("counters", "greedy")
@pytest.mark.timeout(400)
@pytest.mark.long
def test_sets_modes_and_draft_tokens_are_measured_in_one_run_that_resumes(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    args = ["--recipe", recipe_path]
    store = write_store(tmp_path / "store", Target.read(target_folder))
    run_here("train", "offline", *args, "--store", store, "--output", tmp_path / "draft")
    run_here("train", "export", *args, "--run", tmp_path / "draft", "--output", tmp_path / "export")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    rows = [{"id": f"q{n}", "category": f"kind{n % 2}", "turns": [f"Explain {n}."]} for n in range(4)]
    one.write_text("\n".join(map(json.dumps, rows)) + "\n")
    two.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(3)))
    output = tmp_path / "out"
    words = [*args, "--draft", tmp_path / "export", "--output", output, "--thinking-modes", "enabled,disabled"]
    words += ["--prompts", one, "--prompts", f"second={two}", "--set", "bench.concurrency=[4]"]
    run("bench", "acceptance", *words, "--draft-tokens", "3")
    first = output / "k3/one-enabled-t0.json"
    before = first.stat().st_mtime_ns
    training = tmp_path / "training.jsonl"
    training.write_text(json.dumps({"id": "t", "prompt": "EXPLAIN: 2!"}) + "\n")
    printed = run("bench", "acceptance", *words, "--draft-tokens", "2,3", "--training-conversations", training).stdout
    assert first.stat().st_mtime_ns == before  # not asked again
    assert "thinking enabled, temperature 0, K = 3" in printed
    report = json.loads((output / "acceptance.json").read_text())
    sizes = {"one": {"rows": 4, "overlapping": 1}, "second": {"rows": 3, "overlapping": 0}}
    assert report["overlap"]["sets"] == sizes
    assert (report["overlap"]["rows"][0]["id"], report["overlap"]["rows"][0]["training_id"]) == ("q2", "t")
    for k in ("2", "3"):
        assert report["overlap"]["acceptance"][k]["all"]["n"] <= 14
        groups = [json.loads(path.read_text()) for path in (output / f"k{k}").glob("*.json")]
        assert sum(len(group["answers"]) for group in groups) == 2 * (4 + 3)
        assert report["greedy"][k]["identical"] == report["greedy"][k]["total"] == 14, report["greedy"][k]
        assert report["overruns"][k] == []
        pooled = report["pooled"][k]
        counted = sum(a for group in groups for answer in group["answers"] for a in answer["accepted"])
        assert counted == pooled["counters"]["num_accepted_tokens"]
    assert {(row["dataset"], row["category"]) for row in report["rows"]} == {
        ("one", "kind0"), ("one", "kind1"), ("second", "second"),
    }  # fmt: skip
    (golden,) = yaml.safe_load((output / "golden_al.yaml").read_text()).values()
    assert {mode: sorted(lengths) for mode, lengths in golden.items()} == {"enabled": [2, 3], "disabled": [2, 3]}
    assert (output / "acceptance_by_k.png").exists()
    running = start_server(args, tmp_path)
    try:
        assert running.stdout is not None
        url = running.stdout.readline().split()[0]
        at = [*args, "--draft", tmp_path / "export", "--output", tmp_path / "at", "--thinking-modes", "enabled"]
        printed = run("bench", "acceptance", *at, "--prompts", one, "--endpoint", url).stdout
        wrong = run("bench", "acceptance", *at, "--prompts", one, "--endpoint", url, "--draft-tokens", 2, check=False)
    finally:
        running.terminate()
        running.wait(60)
    assert (running.returncode, running.stdout.read()) == (0, "serve: stopped\n")
    assert sum(line.startswith("| (all) | one | 4 |") for line in printed.splitlines()) == 1, printed
    assert "Greedy replies were not compared" in printed
    assert wrong.returncode == 2
    assert "a server that drafts 3 tokens a step, expected 2" in wrong.stderr
    result = run("bench", "acceptance", *words, "--draft-tokens", "9", check=False)
    assert result.returncode == 2
    assert "from 1 to 3" in result.stderr

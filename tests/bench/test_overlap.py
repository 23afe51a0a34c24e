"""Claims about overlap in `bench acceptance`: both figures are told, and add up to the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.acceptance_report import make_tables, summarize
from bench.overlap import by_conversation, explain_overlap, find_overlap, of_walks, read_set
from bench.replay import measure
from bench.requests import Answer, Turn, answers_to_json
from common.errors import UserError
from contracts.acceptance import Acceptance
from contracts.conversation import Conversation, Sample
from recipe.load import load_recipe
from target.target import Target

QUESTION = "A farmer has seventeen sheep and buys nine more before he sells five of them at the market"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_group(answers: list[Answer], *, per_request: bool = True) -> dict[str, Any]:
    steps = [a for answer in answers for a in answer.accepted]
    counters = {"num_drafts": len(steps), "num_accepted_tokens": sum(steps), "accepted_at_0": 1, "accepted_at_1": 0}
    return {
        "dataset": "set", "thinking_mode": "", "temperature": 0.0, "per_request": per_request, "compared": True,
        "answers": answers_to_json(answers), "counters": counters, "greedy_identical": len(answers), "differing": [],
    }  # fmt: skip


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """A prompt set of three rows, and training conversations that have the first and quote the second."""
    other = QUESTION.replace("sheep", "goats").replace("farmer", "teacher").replace("nine", "two")
    rows = [{"id": f"q{n}", "turns": [text]} for n, text in enumerate([QUESTION, other[::-1], "What is new?"])]
    prompts = write(tmp_path / "set.jsonl", rows)
    said = [(QUESTION.upper().replace(" ", "  "), "Yes."), ("Quote it.", f"So: {other[::-1]}"), ("Hello", "Hi")]
    training = [
        {"id": f"t{n}", "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for n, (a, b) in enumerate(said)
    ]
    return prompts, write(tmp_path / "training.jsonl", training)


def test_rows_that_the_draft_was_trained_on_are_named_and_acceptance_is_told_with_and_without_them(
    sets: tuple[Path, Path],
) -> None:
    prompts, training = sets
    overlap = find_overlap(read_set(prompts), [training])
    turns = [Turn(f"c{n}-0-1", "", "x", [1], [2], dataset="set") for n in range(3)]
    answers = [
        Answer("c0-0-1", [1, 2, 3, 4, 5, 6, 9], "stop", [2, 2], 0.1),
        Answer("c1-0-1", [1, 2, 3, 9], "stop", [1, 1], 0.1),
        Answer("c2-0-1", [1, 2, 9], "stop", [0, 0], 0.1),
    ]
    results = {2: [make_group(answers)]}
    report = {**summarize(turns, results, {9}, 32), "target": "t", "draft": "d"}
    origins = {f"c{n}": ("set", n) for n in range(3)}
    report["overlap"] = overlap.report({2: by_conversation(turns, results[2], 32)}, origins)
    found = report["overlap"]
    assert found["sets"] == {"set": {"rows": 3, "overlapping": 2}}
    assert [(row["id"], row["training_id"], row["in_reply"]) for row in found["rows"]] == [
        ("q0", "t0", False), ("q1", "t1", True),
    ]  # fmt: skip
    figures = found["acceptance"]["2"]
    assert figures["all"]["acceptance_length"] == report["pooled"]["2"]["acceptance_length"] == 2.0
    assert figures["without_overlap"]["acceptance_length"] == 1.0
    assert figures["overlap_only"]["acceptance_length"] == 2.5
    assert figures["all"]["n"] == figures["without_overlap"]["n"] + figures["overlap_only"]["n"] == 3
    (description,) = found["training"]
    assert description["rows"] == 3
    table = make_tables(report)
    assert "Rows that overlap with the training data: 2 of 3 (set 2 of 3)" in table
    assert "Acceptance length, K = 2: all 2.000" in table
    assert "without overlap 1.000" in table


def test_counts_that_a_server_tells_only_in_sum_are_not_split(sets: tuple[Path, Path]) -> None:
    overlap = find_overlap(read_set(sets[0]), [sets[1]])
    answers = [Answer("c0-0-1", [1, 2, 9], "stop", [], 0.1)]
    turns = [Turn("c0-0-1", "", "x", [1], [2], dataset="set")]
    parts = by_conversation(turns, [make_group(answers, per_request=False)], 32)
    report = overlap.report({2: parts}, {"c0": ("set", 0)})
    assert report["acceptance"]["2"] == {"all": None, "without_overlap": None, "overlap_only": None}
    assert "not known by row" in explain_overlap(report)[1]


def test_held_out_conversations_are_counted_by_their_walks() -> None:
    walks = [{"turn": "c0-0-5", "accepted": [1, 0]}, {"turn": "c0-1-9", "accepted": [2]}]
    assert of_walks({"walks": walks, "num_draft_tokens": 2}) == {"c0": Acceptance((1, 1, 1))}


def write_held_out(folder: Path, target_fingerprint: str) -> list[str]:
    """Three finished conversations; their ids."""
    folder.mkdir()
    ids = [f"{n:032x}" for n in range(3)]
    records = [
        Conversation(
            id=id_, source_id=id_, index=n, messages=[{"role": "user", "content": f"Explain {n}."}],
            samples=[Sample(token_ids=[1, 2, 3, 4, 5, 6], loss_spans=[(2, 6)])], finish_reason="stop",
            sampling={"temperature": 0.0}, target={}, template="", usage={},
        )
        for n, id_ in enumerate(ids)
    ]  # fmt: skip
    write(folder / "conversations.jsonl", [record.model_dump(mode="json") for record in records])
    state = {"stage": "synth generate", "complete": True, "settings": {}, "inputs": {"target": target_fingerprint}}
    (folder / "run.json").write_text(json.dumps({**state, "summary": {"input": 3, "truncated": 0}}))
    return ids


def test_a_finished_measurement_of_held_out_conversations_is_told_the_training_data_later(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers' answers are there already, so none is started."""
    recipe = load_recipe(recipe_path)
    ids = write_held_out(tmp_path / "held_out", Target.here(recipe.target).fingerprint)
    output = tmp_path / "out"
    output.mkdir()
    for name, k in (("baseline", 0), ("draft-k1", 1), ("draft-k3", 3)):
        accepted = [[n % (k + 1), 0] if k else [] for n in range(3)]
        answers = [Answer(f"{id_}-0-2", [3, 4, 5, 6], "stop", a, 0.1) for id_, a in zip(ids, accepted, strict=True)]
        point = {**make_group(answers), "seconds": 1.0, "tokens": 12}
        (output / f"{name}.json").write_text(json.dumps({"startup_s": 1.0, "points": {"1": point, "4": point}}))
    monkeypatch.setattr("bench.replay.speculation_of", lambda *_: {"num_speculative_tokens": 3})
    monkeypatch.setattr("bench.replay.draft_inputs", lambda *_: {"draft": ""})
    args = (recipe, tmp_path / "held_out", tmp_path / "draft", output, None)
    assert "overlap" not in measure(*args)
    training = write(tmp_path / "training.jsonl", [{"id": "t", "prompt": "EXPLAIN: 2!"}])
    report = measure(*args, [training])
    assert report["overlap"]["sets"] == {"conversations": {"rows": 3, "overlapping": 1}}
    figures = report["overlap"]["acceptance"]["3"]
    assert figures["all"]["acceptance_length"] == report["acceptance_length"] == 1.6
    assert (figures["without_overlap"]["n"], figures["overlap_only"]["acceptance_length"]) == (2, 3.0)
    assert "overlap with the training data: 1 of 3" in (output / "acceptance.md").read_text()
    assert measure(*args) == measure(*args, [training]) == report  # finished, skipped


def test_training_data_that_is_not_there_is_refused(sets: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--training-conversations"):
        find_overlap(read_set(sets[0]), [tmp_path / "missing"])

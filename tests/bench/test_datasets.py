"""Claims about prompt sets: their columns become rows of turns with a category; what cannot be had is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.datasets import write_prompts
from common.errors import UserError
from contracts.evaluation_sets import PLACEHOLDER, SOURCES, make_row, parse_name
from contracts.prompt_files import open_prompts
from contracts.prompts import read_prompt_row

ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mt_bench", {"prompt": ["a", "b"], "category": "writing", "prompt_id": 3}, {"turns": ["a", "b"], "c": "writing"}),
    ("gsm8k", {"question": "a", "answer": "#### 4"}, {"turns": ["a"], "c": "gsm8k"}),
    ("humaneval", {"task_id": "HumanEval/0", "prompt": "def f():"}, {"turns": ["def f():"], "c": "humaneval"}),
    ("math500", {"problem": "a", "subject": "Algebra"}, {"turns": ["a"], "c": "Algebra"}),
    ("aime", {"problem": "a"}, {"turns": ["a"], "c": "aime"}),
    ("speed_bench", {"question_id": "q", "turns": ["a"], "category": "coding"}, {"turns": ["a"], "c": "coding"}),
    ("gsm8k", {"id": "mine", "turns": ["a"], "category": "math"}, {"turns": ["a"], "c": "math"}),
]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_the_columns_of_each_set_become_turns_and_a_category(
    name: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    made = make_row(row, name, 0, SOURCES[name])
    assert made is not None
    assert (made["turns"], made["category"]) == (expected["turns"], expected["c"])


def test_a_local_file_keeps_its_messages_and_is_named_by_itself_or_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    file.write_text("\n".join(json.dumps({"messages": messages, "question_id": n}) for n in range(3)))
    written = write_prompts(str(file), tmp_path / "out", limit=2)
    assert written.name == "mine.jsonl"
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert rows[1] == {"id": "1", "category": "mine", "messages": messages}
    assert len(rows) == 2
    assert parse_name(f"gsm8k={file}") == ("gsm8k", file)
    assert parse_name("gsm8k") == ("gsm8k", None)


def test_a_local_file_may_be_of_any_format_that_synth_reads(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}], "category": None}, {"prompt": "b"}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    written = write_prompts(str(tmp_path / "mine.json"), tmp_path / "out", limit=None)
    found = [row.value for row in open_prompts(written).rows()]
    assert [row["category"] for row in found] == ["mine", "mine"]
    assert [read_prompt_row(row).messages[0]["content"] for row in found] == ["a", "b"]


def test_a_turn_that_its_set_does_not_hold_is_left_out() -> None:
    row = {"turns": [f"{PLACEHOLDER} FROM THE SOURCE"], "category": "qa"}
    assert make_row(row, "speed_bench", 0, SOURCES["speed_bench"]) is None


@pytest.mark.parametrize("text", ["gsm8", "gsm8k=missing.jsonl", "../x={file}"])
def test_an_unknown_set_or_a_name_that_is_a_path_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="expected"):
        parse_name(text.format(file=file))


def test_a_set_that_is_not_in_the_cache_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Give a local copy: --prompts aime=FILE\.jsonl"):
        write_prompts("aime", tmp_path, None)


def test_turns_that_are_json_in_a_string_are_those_that_synth_reads() -> None:
    row = {"turns": '["a", "b"]', "category": "qa"}
    made = make_row(row, "speed_bench", 0, SOURCES["speed_bench"])
    assert made is not None
    assert made["turns"] == ["a", "b"]
    assert read_prompt_row(made).messages == read_prompt_row(row).messages

"""Claims about reading prompts: every row becomes a prompt or a reason, with a mode and an id that never change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import UserError
from synth.prompts import Prompt, Reject, read_prompts

MODES = ["enabled", "disabled", "adaptive"]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_row_i_takes_mode_i_of_the_whole_input_rejects_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"nothing": 1}, {"prompt": "b"}, {"prompt": "c"}]
    found = list(read_prompts(write(tmp_path / "p", rows), MODES))
    assert [type(row) for row in found] == [Prompt, Reject, Prompt, Prompt]
    assert [row.thinking_mode for row in found if isinstance(row, Prompt)] == ["enabled", "adaptive", "enabled"]


def test_an_id_is_the_content_of_the_prompt_and_its_mode(tmp_path: Path) -> None:
    first, second, third = read_prompts(
        write(tmp_path / "p", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}]), MODES
    )
    assert len({first.id, second.id, third.id}) == 3
    (again,) = read_prompts(write(tmp_path / "q", [{"prompt": "a", "id": "named"}]), MODES)
    assert again.id == first.id
    assert isinstance(again, Prompt)
    assert again.source_id == "named"


def test_the_same_prompt_and_mode_twice_is_rejected_and_counted(tmp_path: Path) -> None:
    rows = list(read_prompts(write(tmp_path / "p", [{"prompt": "a"}, {"prompt": "a"}]), ["enabled"]))
    assert isinstance(rows[1], Reject)
    assert "the same prompt" in rows[1].reason


def test_assistant_turns_of_the_source_are_left_to_the_target(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "somebody else's answer"},
        {"role": "user", "content": "q2"},
    ]
    (prompt,) = read_prompts(write(tmp_path / "p", [{"messages": messages}]), [])
    assert isinstance(prompt, Prompt)
    assert [message["role"] for message in prompt.messages] == ["system", "user", "user"]
    assert prompt.thinking_mode == ""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not a JSON object"),
        ({"messages": []}, "no user message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": None}]}, "no text"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(tmp_path: Path, row: Any, reason: str) -> None:
    (found,) = read_prompts(write(tmp_path / "p", [row]), MODES)
    assert isinstance(found, Reject)
    assert reason in found.reason


def test_a_line_that_is_no_json_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match="p:2"):
        list(read_prompts(tmp_path / "p", MODES))

"""Claims about reading prompts: every form and format, a prompt or a reason for every row, ids and modes that last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from common.seen import Seen
from contracts.prompt_files import open_prompts
from contracts.prompts import read_prompt_row
from synth.prompts import Prompt, Reject, mark_places, read_prompts

MODES = ["enabled", "disabled", "adaptive"]
PLACE = {"role": "assistant"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(
    path: Path, modes: list[str] = MODES, temperatures: list[float] | None = None, num_samples: int = 1
) -> list[Prompt | Reject]:
    return list(read_prompts(open_prompts(path).rows(), modes, temperatures or [0.0], num_samples, Seen()))


def read_messages(row: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The row's messages with the target's places, and its tools."""
    source = read_prompt_row(row)
    return mark_places(source.messages), source.tools


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_row_i_takes_mode_i_of_the_whole_input_rejects_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"nothing": 1}, {"prompt": "b"}, {"prompt": "c"}]
    found = read(write(tmp_path / "p.jsonl", rows))
    assert [type(row) for row in found] == [Prompt, Reject, Prompt, Prompt]
    assert [row.thinking_mode for row in found if isinstance(row, Prompt)] == ["enabled", "adaptive", "enabled"]


def test_an_id_is_the_content_of_the_prompt_and_its_mode(tmp_path: Path) -> None:
    first, second, third = read(write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}]))
    assert isinstance(first, Prompt)
    assert isinstance(second, Prompt)
    assert isinstance(third, Prompt)
    assert len({first.id, second.id, third.id}) == 3
    (again,) = read(write(tmp_path / "q.jsonl", [{"prompt": "a", "id": "named"}]))
    assert isinstance(again, Prompt)
    assert again.id == first.id
    assert again.source_id == "named"


def test_a_rows_own_id_is_kept_where_it_is_unique(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "id": 7}, {"prompt": "b", "id": 7}, {"prompt": "c"}, {"prompt": "d", "question_id": 81}]
    found = [row for row in read(write(tmp_path / "p.jsonl", rows)) if isinstance(row, Prompt)]
    assert [row.source_id for row in found] == ["7", found[1].id, found[2].id, "81"]


def test_the_same_prompt_and_mode_twice_is_rejected_with_the_row_that_has_it(tmp_path: Path) -> None:
    _, second = read(write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a"}]), ["enabled"])
    assert isinstance(second, Reject)
    assert "the same prompt and mode as row 0" in second.reason
    assert second.where.endswith("p.jsonl:2")


def test_samples_and_temperatures_multiply_and_have_ids_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    found = [row for row in read(path, MODES, [0.5, 1.0], 2) if isinstance(row, Prompt)]
    assert [(row.sample, row.temperature) for row in found] == [(0, 0.5), (1, 0.5), (2, 1.0), (3, 1.0)]
    assert len({row.id for row in found}) == 4
    (single,) = read(path)
    assert isinstance(single, Prompt)
    assert found[0].id == single.id


SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "q1"},
    {"from": "gpt", "value": "old"},
    {"from": "human", "value": "q2"},
    {"from": "gpt", "value": "older"},
]
OLD = {"role": "assistant", "content": "x"}
MARKED = [{"role": "system", "content": "s"}, user("q1"), PLACE, user("q2"), PLACE]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "q1"}, [user("q1"), PLACE]),
        ({"turns": ["q1", "q2"]}, [user("q1"), PLACE, user("q2"), PLACE]),
        ({"messages": [user("q1"), OLD, user("q2")]}, [user("q1"), PLACE, user("q2"), PLACE]),
        ({"messages": [user("q1"), user("q2")]}, [user("q1"), PLACE, user("q2"), PLACE]),
        # With assistant turns, the places are theirs: two user turns in a row were one question.
        ({"messages": [user("q1"), user("q2"), OLD]}, [user("q1"), user("q2"), PLACE]),
        ({"messages": [{"role": "assistant", "content": "Hi!"}, user("q1")]}, [user("q1"), PLACE]),
        ({"messages": [{"role": r, "content": r} for r in ("root", "developer", "user")]},
         [{"role": "root", "content": "root"}, {"role": "developer", "content": "developer"}, user("user"), PLACE]),
        ({"messages": [user("q1"), OLD, {"role": "system", "content": "s"}]}, [user("q1"), PLACE]),
        ({"conversations": SHAREGPT}, MARKED),
        ({"conversations": json.dumps(SHAREGPT)}, MARKED),
        ({"conversations": SHAREGPT[1:], "system": "s"}, MARKED),
        ({"conversations": [user("q1"), {"role": "assistant", "content": "x"}]}, [user("q1"), PLACE]),
        ({"prompt": [user("q1")]}, [user("q1"), PLACE]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
         [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PLACE]),
    ],
)  # fmt: skip
def test_every_form_of_row_becomes_messages_with_the_targets_places(row: Any, messages: list[Any]) -> None:
    assert read_messages(row) == (messages, None)


def test_tool_results_stand_after_the_place_that_names_their_tools() -> None:
    calls = [{"id": f"c{i}", "function": {"name": name, "arguments": "{}"}} for i, name in enumerate(("look", "add"))]
    tools = [{"type": "function", "function": {"name": "look"}}]
    messages = [
        user("q"),
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "tool", "tool_call_id": "c0", "content": "seen"},
        {"role": "assistant", "content": "done"},
    ]
    marked, found_tools = read_messages({"messages": messages, "tools": json.dumps(tools)})
    assert found_tools == tools
    assert marked == [
        user("q"),
        {"role": "assistant", "tool_calls": ["add", "look"]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "tool", "content": "seen", "name": "look"},
        PLACE,
    ]
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
        {"from": "observation", "value": "seen"},
        {"from": "gpt", "value": "done"},
    ]
    assert read_messages({"conversations": sharegpt})[0][1:3] == [
        {"role": "assistant", "tool_calls": ["look"]},
        {"role": "tool", "content": "seen", "name": "look"},
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not a JSON object"),
        ({"text": "x"}, "none of `messages`, `conversations`, `turns`, `prompt`; its keys are text"),
        ({"messages": []}, "no user message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "no text"),
        ({"messages": [{"role": "user", "content": [{"image": "x"}]}]}, "no text"),
        ({"messages": [user("q"), {"role": "tool", "content": "x"}]}, "a tool result without a call"),
        ({"turns": ["q", 1]}, "no text"),
        ({"prompt": "q", "tools": "look"}, "`tools`"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "?"}]}, "no function"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(tmp_path: Path, row: Any, reason: str) -> None:
    (found,) = read(write(tmp_path / "p.jsonl", [row]))
    assert isinstance(found, Reject)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("part", "medium"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, "image"),
        ({"type": "image"}, "image"),
        ({"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "video"),
    ],
)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_message_with_media_is_a_reject_that_names_them(tmp_path: Path, part: Any, medium: str, role: str) -> None:
    seen = {"role": role, "content": [{"type": "text", "text": "What is this?"}, part]}
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    messages = [user("q"), called, seen] if role == "tool" else [seen]
    (found,) = read(write(tmp_path / "p.jsonl", [{"messages": messages}]))
    assert isinstance(found, Reject)
    assert found.reason == f"a {role} message with {medium} content: drafts are trained on text alone"


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_a_row_with_media_beside_its_text_is_a_reject(tmp_path: Path, key: str) -> None:
    llava = [{"from": "human", "value": "<image>\nWhat is this?"}]
    rows = [{"conversations": llava, key: ["a.jpg"]}, {"prompt": "q", key: None}, {"prompt": "r", key: []}]
    first, *others = read(write(tmp_path / "p.jsonl", rows))
    assert isinstance(first, Reject)
    assert first.reason == f"a row with `{key}`: drafts are trained on text alone"
    assert all(isinstance(row, Prompt) for row in others)


def test_a_line_that_is_no_json_is_a_reject_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n{"prompt": "b"}\n')
    first, second, third = read(tmp_path / "p.jsonl")
    assert isinstance(second, Reject)
    assert second.where.endswith("p.jsonl:3")
    assert "broken JSON" in second.reason
    assert (first.index, second.index, third.index) == (0, 1, 2)


def test_text_that_utf8_cannot_hold_costs_its_row_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a \\ud800"}\n{"prompt": "b", "id": "\\ud800", "category": "\\ud800"}\n'
    )
    first, second = read(tmp_path / "p.jsonl")
    assert isinstance(first, Reject)
    assert "utf-8" in first.reason
    assert isinstance(second, Prompt)
    assert (second.source_id, second.category) == ("?", "?")


def test_a_null_category_or_id_is_none_at_all(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "category": None, "id": None}, {"prompt": "b", "category": 0, "id": 0}]
    first, second = read(write(tmp_path / "p.jsonl", rows))
    assert isinstance(first, Prompt)
    assert isinstance(second, Prompt)
    assert (first.category, first.source_id) == ("", first.id)
    assert (second.category, second.source_id) == ("0", "0")


ROWS = [
    {"id": "a", "messages": [user("one"), {"role": "assistant", "content": "x"}]},
    {"id": "b", "messages": [{"role": "system", "content": "s"}, user("two")]},
    {"id": "c", "messages": [user("three")]},
]


def test_the_same_rows_in_every_format_are_the_same_prompts(tmp_path: Path) -> None:
    expected = read(write(tmp_path / "rows.jsonl", ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    parts = tmp_path / "parts/deeper"
    parts.mkdir(parents=True)
    pyarrow.parquet.write_table(table.slice(0, 1), tmp_path / "parts/0.parquet")
    (tmp_path / "parts/1.json").write_text(json.dumps(ROWS[1:2]))
    write(parts / "2.jsonl", ROWS[2:])
    (tmp_path / "parts/notes.txt").write_text("no prompts")
    for name in ("rows.json", "lines.json", "rows.parquet", "saved", "parts"):
        assert read(tmp_path / name) == expected, name
        assert open_prompts(tmp_path / name).num_rows == 3


def test_only_wanted_rows_are_read_and_the_others_keep_their_places(tmp_path: Path) -> None:
    rows = [{"prompt": str(number)} for number in range(600)]
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "saved"):
        found = list(open_prompts(tmp_path / name).rows(lambda index: index in (3, 599)))
        assert [(row.index, row.value) for row in found] == [(3, {"prompt": "3"}), (599, {"prompt": "599"})], name


def test_a_prompt_sets_checksum_is_of_its_content(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS)
    other = write(tmp_path / "c.jsonl", ROWS[:2])
    assert open_prompts(one).checksum == open_prompts(same).checksum != open_prompts(other).checksum


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"\n", "no rows"),
        ("broken.json", b'[{"prompt": "a"}, {', "broken JSON"),
        ("no.parquet", b"PAR?", "no Parquet"),
    ],
)
def test_a_prompt_set_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes | None, found: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=found):
        open_prompts(tmp_path / name)


def test_a_folder_without_prompts_and_one_with_splits_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of"):
        open_prompts(tmp_path)
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="both/train"):
        open_prompts(tmp_path / "both")
    assert open_prompts(tmp_path / "both/test").num_rows == 3


def test_a_hub_name_without_a_network_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="nobody/nothing:test: found neither a file nor a dataset of the hub"):
        open_prompts("nobody/nothing:test")

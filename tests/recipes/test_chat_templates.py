"""Claims about the training templates: they render what the target's own renders, and tag what the assistant says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from conftest import ROOT
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = ROOT / "chat_templates"
VECTORS = ROOT.parent / "shared/data/m3_template_vectors.jsonl"
M3 = (FOLDER / "minimax_m3.jinja").read_text(encoding="utf-8")
MARK = "]<]minimax[>["


def render(
    messages: list[dict[str, Any]], tools: Any = None, end: bool = False, **kwargs: Any
) -> tuple[str, list[str]]:
    """The text, and what is tagged in it."""
    texts, spans = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=M3, add_generation_prompt=end,
        return_assistant_tokens_mask=True, **kwargs,
    )  # fmt: skip
    return texts[0], [texts[0][start:stop] for start, stop in spans[0]]


@pytest.mark.skipif(not VECTORS.exists(), reason="the vectors are not part of the project")
def test_m3s_template_renders_all_vectors_to_the_byte() -> None:
    rows = [json.loads(line) for line in VECTORS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 104
    for row in rows:
        mode = {} if row["thinking_mode"] is None else {"thinking_mode": row["thinking_mode"]}
        text, tagged = render(row["messages"], row["tools"], row["add_generation_prompt"], **mode)
        assert text == row["text"], row["case"]
        assert tagged == row["assistant_text"], row["case"]


@pytest.mark.parametrize(("mode", "end"), [("enabled", "<mm:think>"), ("disabled", "</mm:think>"), ("adaptive", "")])
def test_the_mode_is_told_to_the_target_and_begins_its_turn(mode: str, end: str) -> None:
    text, tagged = render([{"role": "user", "content": "Hi"}], end=True, thinking_mode=mode)
    assert f"\nCurrent thinking mode: {mode}. " in text
    assert text.endswith(f"]~b]user\nHi[e~[\n]~b]ai\n{end}")
    assert tagged == []


def test_thoughts_answers_and_calls_are_tagged_up_to_the_end_of_the_turn() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, {"b": None, "c": True}], "d": 0.5}}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "Well.", "reasoning_content": "Call it.", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "Done."},
    ]
    text, tagged = render(messages)
    end = f"{MARK}</invoke>\n{MARK}</tool_call>[e~["
    value = f"{MARK}<item>1{MARK}</item>{MARK}<item>{MARK}<c>true{MARK}</c>{MARK}</item>"
    assert tagged == [
        f"<mm:think>Call it.</mm:think>Well.{MARK}<tool_call>\n"
        f'{MARK}<invoke name="f">{MARK}<a>{value}{MARK}</a>{MARK}<d>0.5{MARK}</d>{end}',
        "</mm:think>Done.[e~[",
    ]
    assert "]~b]tool\n<response>1</response>\n<response>2</response>[e~[\n]~b]ai\n" in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a content part of type image, expected text"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "a system message after the first"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            "arguments are a string",
        ),
    ],
)
def test_what_it_cannot_render_is_an_error(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(messages)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(TemplateError, match="thinking_mode is on, expected enabled, disabled or adaptive"):
        render([{"role": "user", "content": "Hi"}], thinking_mode="on")


def test_the_readme_has_the_checksum_of_every_template() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.jinja"):
        assert f"`{path.name}`" in readme
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme

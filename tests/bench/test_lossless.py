"""Claims about greedy equality under production's settings: it holds with each draft, and a difference is located."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_lines, run, run_here

from bench.lossless import Reply, read_chats, refuse
from common.errors import IncompleteError, UserError

RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
HEADS = "num_attention_heads: 4, num_key_value_heads: 2, head_dim: 64, intermediate_size: 512"
EAGLE3 = f"train.draft={{method: eagle3, ttt_length: 3, {HEADS}}}"
CALL = (
    r'<tool_call>\{"name": "look_up", "arguments": \{"subject": "[a-z_. ]{1,12}", "kind": "(module|class)"\}\}'
    r"</tool_call>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} of Python's standard library",
            "parameters": {
                "type": "object",
                "properties": {
                    "subject": {"type": "string"},
                    "kind": {"type": "string", "enum": ["module", "class", "function"]},
                },
                "required": ["subject", "kind"],
            },
        },
    }
    for name in ("look_up", "call")
]
CHOICES: dict[str, dict[str, Any]] = {
    "free": {"tool_choice": "auto"},
    # The tiny target never calls a tool by itself: the grammar is what makes it, and the parser finds the call.
    "auto": {"tool_choice": "auto", "structured_outputs": {"regex": CALL}},
    "required": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tool_choice": {"type": "function", "function": {"name": "call"}}},
}


def write_template(path: Path) -> Path:
    """The tiny recipe's template, and the tools in the system message, as production's have them."""
    template = (ROOT / "recipes/Tiny-DFlash/chat_template.jinja").read_text()
    before = "{{- 'Thinking mode: '"
    assert template.count(before) == 1
    tools = "{%- if tools -%}{{- 'Tools: ' + (tools | tojson) + '\\n' -}}{%- endif -%}\n"
    path.write_text(template.replace(before, tools + before))
    return path


def write_chats(path: Path, prompts: Path) -> Path:
    """Five questions, each with every tool_choice; all of them begin with the same tools."""
    rows = [
        {"id": f"{name}-{number}", "messages": prompt["messages"][:2], "tools": TOOLS, "max_tokens": 112, **choice}
        for number, prompt in enumerate(read_lines(prompts)[:5])
        for name, choice in CHOICES.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def work(trained_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of the tiny target, a DFlash and an EAGLE3 draft of them, chat requests with tools."""
    folder = tmp_path_factory.mktemp("production")
    prompts = folder / "prompts.jsonl"
    lines = (trained_target / "prompts/train.jsonl").read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:24]))
    args = ["--recipe", RECIPE, *recipe_args(trained_target)]
    run("synth", "generate", *args, "--prompts", prompts, "--output", folder / "synth")
    run("dump", "run", *args, "--conversations", folder / "synth", "--output", folder / "store")
    for name, more in (("dflash", []), ("eagle3", ["--set", EAGLE3])):
        run_here("train", "offline", *args, *more, "--store", folder / "store", "--output", folder / f"{name}-run")
        run_here("train", "export", *args, *more, "--run", folder / f"{name}-run", "--output", folder / name)
    write_template(folder / "template.jinja")
    write_chats(folder / "chats.jsonl", trained_target / "prompts/held_out.jsonl")
    return folder


def recipe_args(trained_target: Path) -> list[str]:
    values = [f"target.path={trained_target}/target", "train.num_steps=80", "synth.max_tokens=128"]
    return [word for value in [*values, "serve.args.block-size=32"] for word in ("--set", value)]


def check_args(trained_target: Path, work: Path, draft: str) -> list[object]:
    flags = {
        "tool-call-parser": "hermes",
        "enable-auto-tool-choice": "true",
        "chat-template": work / "template.jinja",
    }
    production = [word for k, v in flags.items() for word in ("--set", f"serve.purposes.production.args.{k}={v}")]
    args = ["bench", "lossless", "--recipe", RECIPE, *recipe_args(trained_target), *production]
    return [*args, "--conversations", work / "synth", "--requests", work / "chats.jsonl", "--draft", work / draft]


def run_lossless(trained_target: Path, work: Path, draft: str) -> Path:
    """`bench lossless` with a draft, once; its output. All drafts share the replies of the server without one."""
    output, baseline = work / f"lossless-{draft}", work / "lossless-dflash/baseline.json"
    if not output.exists():
        output.mkdir()
        if baseline.exists():
            shutil.copy(baseline, output)
        run(*check_args(trained_target, work, draft), "--output", output)
    return output


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.parametrize("draft", ["dflash", pytest.param("eagle3", marks=pytest.mark.rare)])
def test_greedy_replies_are_the_targets_with_cached_prefixes_chunks_tools_and_concurrency(
    trained_target: Path, work: Path, draft: str
) -> None:
    output = run_lossless(trained_target, work, draft)
    report = json.loads((output / "lossless.json").read_text())
    budget = report["max_num_batched_tokens"]
    passes = {name: json.loads((output / f"{name}.json").read_text()) for name in ("baseline", "draft")}
    assert [(p["concurrency"], p["name"]) for p in passes["draft"]] == [
        (number, name) for number in (1, 8, 32) for name in ("first", "repeated")
    ]
    alone = {reply["id"]: reply for reply in passes["baseline"][0]["replies"]}
    assert len(alone) > 32 + len(CHOICES)  # more than fit in one batch
    for found in (*passes["baseline"], *passes["draft"]):
        differing = {difference["turn"] for difference in found["differing"]}
        assert all(abs(d["logit_gap"]) <= 1e-3 for d in found["differing"]), found["differing"]
        for reply in found["replies"]:
            if reply["id"] not in differing:
                assert reply["token_ids"] == alone[reply["id"]]["token_ids"]
                assert reply["seen"] == alone[reply["id"]]["seen"]
    for found in passes["draft"]:
        counters = found["counters"]
        assert counters["prefix_hits"] > 0
        if found["name"] == "repeated":
            assert counters["prefix_hits"] > 0.5 * counters["prefix_queries"]
        else:
            assert max(len(reply["prompt"]) - reply["cached"] for reply in found["replies"]) > budget
        assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]
    called = {id_.partition("-")[0] for id_, reply in alone.items() if reply["seen"].get("tool_calls")}
    assert called >= {"auto", "named"}


@pytest.mark.vllm
@pytest.mark.long
def test_a_reply_that_is_not_the_targets_fails_and_is_located(trained_target: Path, work: Path, tmp_path: Path) -> None:
    passes = json.loads((run_lossless(trained_target, work, "dflash") / "baseline.json").read_text())
    reply = next(reply for reply in passes[0]["replies"] if "text" in reply["seen"])  # no grammar moves its scores
    right = reply["token_ids"][5]
    reply["token_ids"][5] = wrong = right + 1
    output = tmp_path / "out"
    output.mkdir()
    (output / "baseline.json").write_text(json.dumps(passes[:1]))
    args = check_args(trained_target, work, "dflash")
    result = run(*args, "--output", output, "--concurrency", 8, check=False)
    assert result.returncode == 1
    assert "draft, 1 at once, first pass: found 1 of" in result.stderr
    assert f"First: {reply['id']} at token 5, {right} instead of {wrong}, logit gap -" in result.stderr
    assert not json.loads((output / "run.json").read_text())["complete"]


def make_report(**changes: Any) -> dict[str, Any]:
    rows = [
        {
            "server": "draft", "concurrency": 8, "order": order, "replies": 3, "identical": 3, "ties": 0, "wrong": [],
            "tool_calls": 1, "chunked": 1, "cached": 0.5, "accepted_tokens": 4, **changes,
        }
        for order in ("first", "repeated")
    ]  # fmt: skip
    return {"passes": rows, "tolerance": 1e-3, "num_chats": 1}


def test_a_load_that_exercises_too_little_is_refused() -> None:
    refuse(make_report(), {})
    for change, message in (
        ({"cached": 0.0}, "no prompt in the prefix cache"),
        ({"chunked": 0}, "no prompt longer than a step's tokens"),
        ({"accepted_tokens": 0}, "no accepted draft token"),
        ({"tool_calls": 0}, "no parsed tool call"),
    ):
        with pytest.raises(IncompleteError, match=message):
            refuse(make_report(**change), {})


def test_replies_that_end_elsewhere_or_are_parsed_otherwise_are_told() -> None:
    alone = {"a": Reply("a", [1], [2, 3, 4], {"text": "x"}, 0)}
    end = {"turn": "a", "first_token": None, "tokens": None, "logit_gap": None}
    with pytest.raises(IncompleteError, match="a ends elsewhere than after its 3 tokens"):
        refuse(make_report(wrong=[end]), alone)
    seen = {"turn": "a", "expected": {"text": "x"}, "found": {"text": "y"}}
    with pytest.raises(IncompleteError, match=r"a has the same tokens, but \{'text': 'y'\} instead of"):
        refuse(make_report(wrong=[seen]), alone)


def test_chat_requests_need_messages_and_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    row = {"id": "a", "messages": [], "max_tokens": 3}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"messages": []}) + "\n")
    requests = read_chats(path, max_tokens=9)
    assert [asdict(request) for request in requests] == [
        {"id": "a", "is_chat": True, "body": {"max_tokens": 3, "messages": []}},
        {"id": "2", "is_chat": True, "body": {"max_tokens": 9, "messages": []}},
    ]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="an id twice"):
        read_chats(path, 9)
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r"chats.jsonl:1: found no messages"):
        read_chats(path, 9)

"""Claims about what a run records: modes, sampling, tools, loops, ends, formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import scripted
from conftest import read_lines, run_here
from generated import generate, settings, write
from page_data import text_of, unpack

from common.errors import UserError
from contracts.conversation import read_conversations
from recipe.load import load_recipe
from synth.sampling import resolve_sampling

FILE = "conversations.jsonl"


def test_modes_have_weights_and_go_into_request_and_record(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [{"prompt": f"q{i}"} for i in range(6)]
    records = generate(recipe_path, tmp_path, rows, server, "--thinking-modes", "enabled:2,disabled:1")
    assert [record.thinking_mode for record in records] == ["enabled", "enabled", "disabled"] * 2
    sent = {body["messages"][0]["content"]: body["chat_template_kwargs"] for body in server.requests}
    assert sent == {f"q{i}": {"thinking_mode": records[i].thinking_mode} for i in range(6)}


def test_a_recipe_names_the_modes_variable_and_its_values(
    recipe_path: Path, target_folder: Path, tmp_path: Path, server: scripted.Server
) -> None:
    shutil.copytree(target_folder, tmp_path / "target")
    template = tmp_path / "target/chat_template.jinja"
    template.write_text(template.read_text().replace("thinking_mode", "enable_thinking"))
    more = settings(
        f"target.path={tmp_path / 'target'}",
        "target.thinking_mode_name=enable_thinking",
        "target.thinking_mode_values={enabled: true, disabled: false, adaptive: null}",
    )
    generate(recipe_path, tmp_path, [{"prompt": f"q{i}"} for i in range(3)], server, *more)
    sent = {body["messages"][0]["content"]: body.get("chat_template_kwargs") for body in server.requests}
    assert sent == {"q0": {"enable_thinking": True}, "q1": {"enable_thinking": False}, "q2": None}


def test_without_modes_nothing_is_sent(recipe_path: Path, tmp_path: Path, server: scripted.Server) -> None:
    (record,) = generate(recipe_path, tmp_path, [{"prompt": "q"}], server, "--thinking-modes", "")
    assert record.thinking_mode == ""
    assert "chat_template_kwargs" not in server.requests[0]


def test_a_mode_without_a_value_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "q"}])
    more = settings("target.thinking_mode_values={enabled: true}")
    args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", *more)
    result = run_here("synth", "generate", *args, check=False)
    assert result.returncode == 2
    assert "found disabled, expected one of enabled" in result.stderr


def test_system_messages_and_tools_reach_the_target_and_the_record(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    messages = [{"role": role, "content": f"as {role}"} for role in ("root", "developer", "system", "user")]
    (record,) = generate(recipe_path, tmp_path, [{"messages": messages, "tools": tools}], server)
    assert server.requests[0]["tools"] == record.tools == tools
    assert server.requests[0]["messages"] == messages
    assert record.messages == [*messages, {"role": "assistant", "content": "reply to as user"}]


def test_a_later_turn_sees_the_targets_own_thought(recipe_path: Path, tmp_path: Path, server: scripted.Server) -> None:
    generate(recipe_path, tmp_path, [{"turns": ["a</mm:think>b", "c"]}], server)
    assert server.requests[1]["messages"][1] == {
        "role": "assistant",
        "reasoning_content": "reply to a",
        "content": "b",
    }


def test_samples_and_temperatures_have_seeds_of_their_own_that_never_change(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    more = settings("synth.temperature=[0.7, 1.0]", "synth.num_samples=2", "synth.top_p=0.9")
    rows = [{"prompt": "q0"}, {"no": "prompt"}]
    records = generate(recipe_path, tmp_path, rows, server, *more)
    assert [(record.index, record.sample) for record in records] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [record.sampling["temperature"] for record in records] == [0.7, 0.7, 1.0, 1.0]
    assert len({record.sampling["seed"] for record in records}) == 4
    assert {body["top_p"] for body in server.requests} == {0.9}
    summary = json.loads((tmp_path / "out/run.json").read_text())["summary"]
    assert (summary["done"], summary["filtered"], summary["input"], summary["rows"]) == (4, 4, 8, 2)
    seeds = [record.sampling["seed"] for record in records]
    (tmp_path / "again").mkdir()
    assert [r.sampling["seed"] for r in generate(recipe_path, tmp_path / "again", rows, server, *more)] == seeds


OFF = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
NONE = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def test_sampling_comes_from_the_recipe_else_from_the_target_else_it_is_asked_for(
    recipe_path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()

    def resolve(*values: str) -> dict[str, Any]:
        return resolve_sampling(load_recipe(recipe_path, [f"target.path={target}", *values])).settings()

    def write_config(**values: Any) -> None:
        (target / "generation_config.json").write_text(json.dumps(values))

    with pytest.raises(UserError, match="found none in the recipe"):
        resolve("synth.temperature=null")
    write_config(temperature=1.0, top_p=0.95, top_k=40)
    assert resolve("synth.temperature=null") == {"temperature": [1.0], **OFF, "top_p": 0.95, "top_k": 40, **NONE}
    found = resolve("synth.temperature=0.5", "synth.top_k=7")
    assert found == {"temperature": [0.5], **OFF, "top_p": 0.95, "top_k": 7, **NONE}
    write_config(temperature=1.0, top_k=0, min_p=0.1, repetition_penalty=1.05, presence_penalty=None)
    found = resolve("synth.temperature=null", "synth.frequency_penalty=0.5")
    penalties = {"repetition_penalty": 1.05, "presence_penalty": 0.0, "frequency_penalty": 0.5}
    assert found == {"temperature": [1.0], **OFF, "min_p": 0.1, **penalties}
    write_config(do_sample=False)
    assert resolve("synth.temperature=null") == {"temperature": [0.0], **OFF, **NONE}
    with pytest.raises(UserError, match="all would be the same"):
        resolve("synth.temperature=0", "synth.num_samples=2")
    with pytest.raises(UserError, match="max_model_len"):
        resolve("synth.max_tokens=256")


def test_every_sampling_parameter_is_sent_and_recorded_so_that_no_servers_default_counts(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    more = settings("synth.temperature=[0, 0.8]", "synth.min_p=0.05", "synth.repetition_penalty=1.2")
    greedy, sampled = generate(recipe_path, tmp_path, [{"prompt": "q"}], server, *more)
    penalties = {**NONE, "repetition_penalty": 1.2}  # they change the greedy choice, too
    assert greedy.sampling == {"temperature": 0.0, **penalties, "max_tokens": 24}
    seed = sampled.sampling["seed"]
    assert sampled.sampling == {"temperature": 0.8, **OFF, "min_p": 0.05, **penalties, "max_tokens": 24, "seed": seed}
    for body in server.requests:
        record = greedy if body["temperature"] == 0 else sampled
        assert {key: body[key] for key in record.sampling} == record.sampling


def test_a_reply_that_the_server_broke_off_is_tried_again_then_failed_and_redone(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [{"prompt": f"finish {reason}"} for reason in ("abort", "error", "repetition")]
    more = settings("synth.max_attempts=2", "synth.max_failed_fraction=1")
    assert generate(recipe_path, tmp_path, rows, server, *more) == []
    assert len(server.requests) == 6
    lines = read_lines(tmp_path / "out/ledger.jsonl")
    assert {line["status"] for line in lines} == {"failed"}
    assert {line["reason"] for line in lines} == {
        f"a reply that the server broke off (finish_reason {reason!r}) (2 tries)"
        for reason in ("abort", "error", "repetition")
    }
    server.healthy = True
    records = generate(recipe_path, tmp_path, rows, server, *more, "--retry-failed")
    assert [record.finish_reason for record in records] == ["stop"] * 3


def test_no_server_is_started_for_an_input_of_which_no_row_can_be_used(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"text": "a"}, {"text": "b"}])
    args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out")
    result = run_here("synth", "generate", *args, check=False)
    assert result.returncode == 2
    assert "all 2 rows filtered" in result.stderr
    assert "its keys are text" in result.stderr
    assert len(read_lines(tmp_path / "out/rejects.jsonl")) == 2
    assert not (tmp_path / "out/server.log").exists()


def test_a_resume_compares_only_what_changes_the_conversations(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [{"prompt": "q"}]
    generate(recipe_path, tmp_path, rows, server)
    same = settings(
        "serve.args.max-num-seqs=3",
        "serve.args.gpu-memory-utilization=0.5",
        "serve.purposes.production.args.max-model-len=64",
        "serve.variants={other: {path: x, memory_gb: 1}}",
        "serve.port=9000",
        "serve.startup_timeout_s=5",
        "synth.max_attempts=9",
        "synth.concurrency=3",
    )
    generate(recipe_path, tmp_path, rows, server, *same)
    args = ("-r", recipe_path, "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out")
    for changed, name in (
        ("serve.args.dtype=bfloat16", "settings.serve.flags.dtype): found bfloat16, expected float32"),
        ("synth.min_p=0.1", "settings.synth.min_p): found 0.1, expected 0.0"),
        ("synth.max_tokens=20", "settings.synth.max_tokens): found 20, expected 24"),
        ("target.thinking_mode_values={enabled: on, disabled: off, adaptive: null}", "settings.target.thinking_mode_v"),
    ):
        result = run_here("synth", "generate", *args, *settings(changed), check=False)
        assert result.returncode == 2
        assert name in result.stderr


def test_the_end_of_turn_token_is_supervised_unless_left_out(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    (record,) = generate(recipe_path, tmp_path, [{"turns": ["one", "two"]}], server)
    (sample,) = record.samples
    assert [sample.token_ids[end - 1] for _, end in sample.loss_spans] == [scripted.END] * 2
    (tmp_path / "without").mkdir()
    rows = [{"turns": ["one", "endless"]}]
    (record,) = generate(recipe_path, tmp_path / "without", rows, server, *settings("synth.supervise_end=false"))
    (sample,) = record.samples
    assert [bytes(sample.token_ids[a:b]).decode() for a, b in sample.loss_spans] == ["reply to one", "reply to endless"]
    assert sample.token_ids.count(scripted.END) == 3  # they stay in the context


def tool_row(*names: str) -> dict[str, Any]:
    """A source in which the assistant called these tools."""
    calls = [{"id": f"src-{i}", "function": {"name": name, "arguments": "{}"}} for i, name in enumerate(names)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"result {call['id']}"} for call in calls]
    return {
        "messages": [
            {"role": "user", "content": "call look please"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            *results,
            {"role": "assistant", "content": "source's answer"},
            {"role": "user", "content": "thanks"},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }


def test_tool_results_are_replayed_when_the_target_calls_the_same_tool(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    (record,) = generate(recipe_path, tmp_path, [tool_row("look")], server)
    assert record.messages is not None
    assert [message["role"] for message in record.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    call = record.messages[1]["tool_calls"][0]
    assert call["function"]["name"] == "look"
    assert record.messages[2] == {"role": "tool", "name": "look", "content": "result src-0", "tool_call_id": call["id"]}
    assert (record.finish_reason, record.stopped) == ("stop", "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (tool_row("add"), "the target called look, the source has results of add"),
        (tool_row("look", "look"), "the target called look, the source has results of look, look"),
        ({"turns": ["call look please", "thanks"]}, "the target called look, the source has results of none"),
        ({"turns": ["hello", "too long"]}, "turn 1: the prompt does not fit into the context"),
    ],
)
def test_where_a_conversation_cannot_go_on_it_stops_and_says_why(
    recipe_path: Path, tmp_path: Path, server: scripted.Server, row: Any, reason: str
) -> None:
    (record,) = generate(recipe_path, tmp_path, [row], server)
    assert record.stopped.startswith(reason)
    assert record.messages is not None
    assert len([message for message in record.messages if message["role"] == "assistant"]) == 1
    (line,) = read_lines(tmp_path / "out/ledger.jsonl")
    assert (line["status"], line["stopped"]) == ("done", True)
    assert line["reason"].startswith(reason)


def test_a_prompt_that_does_not_fit_is_filtered_with_its_reason(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    assert len(generate(recipe_path, tmp_path, [{"prompt": "too long"}, {"prompt": "q"}], server)) == 1
    (reject,) = read_lines(tmp_path / "out/rejects.jsonl")
    assert reject["index"] == 0
    assert "maximum context length" in reject["reason"]


def test_loops_and_cut_replies_are_marked_and_counted(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    records = generate(
        recipe_path, tmp_path, [{"turns": ["hi", "loop"]}, {"prompt": "endless"}, {"prompt": "q"}], server
    )
    assert records[0].loop is not None
    assert records[0].loop.model_dump() == {"turn": 1, "period": 2, "num_tokens": 600}
    assert [record.finish_reason for record in records] == ["stop", "length", "stop"]
    assert [record.loop for record in records[1:]] == [None, None]
    summary = json.loads((tmp_path / "out/run.json").read_text())["summary"]
    assert (summary["done"], summary["truncated"], summary["loop"]) == (2, 1, 1)


def test_sharegpt_output_has_the_replies_as_generated(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a</mm:think>b"}]}
    (record,) = generate(recipe_path, tmp_path, [row], server, "--output-format", "sharegpt")
    assert record.messages is None
    assert record.conversations == [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a</mm:think>b"},
        {"from": "gpt", "value": "reply to a</mm:think>b"},
    ]
    assert "messages" not in read_lines(tmp_path / "out" / FILE)[0]
    assert record.samples[0].loss_spans


def test_stats_count_and_plot_what_was_written(recipe_path: Path, tmp_path: Path, server: scripted.Server) -> None:
    rows = [{"turns": [f"q{i}", "and"]} for i in range(6)] + [
        {"prompt": "endless"},
        {"no": "prompt"},
        {"prompt": "loop"},
    ]
    generate(recipe_path, tmp_path, rows, server)
    printed = run_here("synth", "stats", tmp_path / "out").stdout
    assert "9 rows: 7 done, 1 truncated, 1 filtered, 0 failed" in printed
    assert "1 loop" in printed
    columns = {
        line.split()[0]: line.split() for line in printed.splitlines() if line.startswith(("enabled", "disabled"))
    }
    # mode, conversations, turns, stop, length
    assert columns["enabled"][1:5] == ["3", "5", "2", "1"]
    assert columns["disabled"][1:5] == ["2", "4", "2", "0"]
    assert (tmp_path / "out/stats.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_the_supervised_tokens_in_the_terminal_and_as_html(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [{"id": "mine", "turns": ["no ids <b>", "and"]}, {"prompt": "fail 400"}]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url)
    run_here("synth", "generate", *args, *settings("synth.max_failed_fraction=1"))
    (record,) = read_conversations(tmp_path / "out")
    for name in ("mine", record.id, record.id[:6]):
        printed = run_here("synth", "inspect", tmp_path / "out", name).stdout
        assert "]~b]user\nno ids <b>[e~[" in printed
        assert "«reply to no ids <b>[e~[»" in printed
        assert "token ids: rendered, not the server's" in printed
    run_here("synth", "inspect", tmp_path / "out", "mine", "--html", tmp_path / "page.html")
    index, (row,) = unpack(tmp_path / "page.html")
    assert "«reply to no ids <b>[e~[»" in text_of(index, row)
    (failed,) = [line["id"] for line in read_lines(tmp_path / "out/ledger.jsonl") if line["status"] == "failed"]
    for name, found in (("zzz", "0 conversations"), (failed, "a row that is failed (HTTP 400")):
        result = run_here("synth", "inspect", tmp_path / "out", name, check=False)
        assert result.returncode == 2
        assert found in result.stderr


def test_browse_shows_every_row_of_the_input_those_without_a_conversation_too(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [{"prompt": "fail 400"}, {"id": "mine", "prompt": "loop"}, {"id": "long", "prompt": "endless"}, {"x": 1}]
    args = ("-r", recipe_path, "--prompts", write(tmp_path / "prompts.jsonl", rows), "--output", tmp_path / "out")
    sets = settings("synth.max_failed_fraction=1", "synth.max_tokens=200", "target.max_model_len=512")
    run_here("synth", "generate", *args, "--endpoint", server.url, *sets)
    printed = run_here("synth", "browse", tmp_path / "out", "--output", tmp_path / "page.html").stdout
    assert "4 of 4 rows" in printed
    index, found = unpack(tmp_path / "page.html")
    facets = {facet["name"]: [facet["values"][code] if code >= 0 else None for code in facet["codes"]]
              for facet in index["facets"]}  # fmt: skip
    entries = sorted(read_lines(tmp_path / "out/ledger.jsonl"), key=lambda entry: entry["index"])
    assert facets["status"] == [entry["status"] for entry in entries]
    assert facets["status"][0] == "failed"
    assert facets["status"][3] == "filtered"
    assert facets["loop"][1] == "yes"
    assert facets["finish reason"][2] == "length"
    assert index["rows"]["label"][1:3] == ["mine", "long"]
    assert "HTTP 400" in found[0][0]["reason"]
    assert [len(parts) for _, parts in found] == [0, 1, 1, 0]
    printed = run_here("synth", "browse", tmp_path / "out", "-o", tmp_path / "two.html", "--limit", "2").stdout
    assert "2 of 4 rows" in printed
    assert unpack(tmp_path / "two.html")[0]["rows"]["label"] == [index["rows"]["label"][n] for n in (0, 2)]


def test_calls_that_a_server_without_token_ids_took_out_of_the_text_are_refused(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    row = {"turns": ["call look, no ids"], "tools": [{"type": "function", "function": {"name": "look"}}]}
    args = ("-r", recipe_path, "--prompts", write(tmp_path / "p.jsonl", [row]), "--output", tmp_path / "out")
    result = run_here("synth", "generate", *args, "--endpoint", server.url, check=False)
    assert result.returncode == 2
    assert "found tool calls, and no token ids" in result.stderr

"""Claims about tools, against real vLLM: the prompt has them, the reply stays whole, its calls are parsed here."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_target, run, run_here
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from contracts.conversation import Conversation, read_conversations
from recipe.load import load_recipe
from serve.command import Serving, build_command
from serve.server import find_port, run_server
from target.target import Target

pytestmark = [pytest.mark.vllm, pytest.mark.proves("token ids"), pytest.mark.timeout(900)]

END = "[e~["
CALL = '{"name": "look", "arguments": {"at": 3}}'
CALL_REPLY = f"<tool_call>{CALL}</tool_call>"
CHAINS = (("<call>", "<tool_call>", CALL, "</tool_call>", END), ("<answer>", "Done.", END))
"""The target's replies: each token is followed by the next one, whatever was before."""
TEMPLATE = """
{%- for tool in tools or [] %}[tool {{ tool.function.name }}]{% endfor %}
{%- for message in messages %}[{{ message.role }}]
{%- if message.role == 'assistant' %}{{ '<answer>' if loop.previtem.role == 'tool' else '<call>' }}{% endif %}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}{{ message.content or '' }}[e~[{% endfor %}
{%- if add_generation_prompt %}[assistant]{{ '<answer>' if messages[-1].role == 'tool' else '<call>' }}{% endif %}"""
ROW = {
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}],
    "messages": [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "seen"},
        {"role": "assistant", "content": "the source's own answer"},
    ],
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that calls `look`, then says "Done."; tokenizer and template mark calls by special tokens."""
    folder = build_target(tmp_path_factory.mktemp("calling-target"), seed=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {"<call>", "<answer>", "<tool_call>", "</tool_call>"}
    words = dict.fromkeys(word for chain in CHAINS for word in chain if word != END)
    tokenizer.add_tokens([AddedToken(word, special=word in special, normalized=False) for word in words])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()  # the last state is the last token's embedding
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    head.zero_()
    for chain in CHAINS:
        for before, after in itertools.pairwise(chain):
            one, next_ = tokenizer.convert_tokens_to_ids([before, after])
            head[next_] += torch.nn.functional.normalize(embeddings[one], dim=0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "tools.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


@pytest.fixture(scope="module")
def args(recipe_path: Path, target: Path) -> tuple[Any, ...]:
    return ("-r", recipe_path, "--set", f"target.path={target}", "--set", "synth.thinking_modes=[]")


@pytest.fixture(scope="module")
def written(args: tuple[Any, ...], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on a server that `synth generate` started itself, and what it printed."""
    output = tmp_path_factory.mktemp("written") / "out"
    return output, run("synth", "generate", *args, "--prompts", prompts, "--output", output).stdout


@pytest.fixture(scope="module")
def parsing_server(recipe_path: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that somebody else started, with a tool call parser."""
    recipe = load_recipe(recipe_path, [f"target.path={target}"])
    serving = Serving(extra_args={"enable-auto-tool-choice": True, "tool-call-parser": "hermes"})
    command = build_command(recipe, Target.read(target), port=find_port("127.0.0.1", None), serving=serving)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with run_server(command, log_path=log, startup_timeout_s=300) as server:
        yield f"{server.url}/v1"


def check(record: Conversation, target: Path) -> None:
    """The record holds the call, its result and the answer, and every token that the target generated."""
    assert record.messages is not None
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = record.messages[1]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("look", {"at": 3})
    assert record.messages[2] == {"role": "tool", "content": "seen", "name": "look", "tool_call_id": call["id"]}
    assert record.messages[3] == {"role": "assistant", "content": "Done."}
    assert (record.finish_reason, record.stopped) == ("stop", "")
    (sample,) = record.samples  # the template renders the parsed call as the target wrote it
    tokenizer = AutoTokenizer.from_pretrained(target)
    spans = [tokenizer.decode(sample.token_ids[start:end]) for start, end in sample.loss_spans]
    assert spans == [f"{CALL_REPLY}{END}", f"Done.{END}"]
    assert tokenizer.decode(sample.token_ids).startswith("[tool look][user]Look.")


def test_a_server_that_we_start_gets_the_tools_and_its_replies_calls_are_parsed_here(
    written: tuple[Path, str], target: Path
) -> None:
    output, printed = written
    (record,) = read_conversations(output)
    check(record, target)
    assert "1 conversations have tools; tool calls are parsed with vLLM's hermes parser" in printed


def test_a_server_with_a_parser_of_its_own_gives_the_same_tokens(
    args: tuple[Any, ...], prompts: Path, target: Path, parsing_server: str, tmp_path: Path
) -> None:
    run_here("synth", "generate", *args, "--prompts", prompts, "--output", tmp_path, "--endpoint", parsing_server)
    (record,) = read_conversations(tmp_path)
    check(record, target)


def test_verify_compares_tool_calls_with_their_tokens(
    args: tuple[Any, ...], written: tuple[Path, str], parsing_server: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written[0], copy)
    run_here("synth", "verify", copy, *args, "--endpoint", parsing_server)
    counts = json.loads((copy / "verified.json").read_text())
    assert counts == {"conversations": 1, "turns": 2, "text_equal": 2, "context_equal": 2}
    record = json.loads((copy / "conversations.jsonl").read_text())
    record["messages"][1]["tool_calls"][0]["function"]["name"] = "leap"
    (copy / "conversations.jsonl").write_text(json.dumps(record) + "\n")
    result = run_here("synth", "verify", copy, *args, "--endpoint", parsing_server, check=False)
    assert result.returncode == 1
    assert "turn 0 (text)" in result.stderr


@pytest.mark.parametrize("supervise_end", [False, True])
def test_a_turn_of_only_an_end_token_is_verified_whether_it_is_in_the_loss_or_not(
    args: tuple[Any, ...], written: tuple[Path, str], target: Path, parsing_server: str, tmp_path: Path,
    supervise_end: bool,
) -> None:  # fmt: skip
    def verify() -> Any:
        (tmp_path / "conversations.jsonl").write_text(record.model_dump_json(exclude={"conversations"}) + "\n")
        return run_here("synth", "verify", tmp_path, *args, "--endpoint", parsing_server, check=False)

    (record,) = read_conversations(written[0])
    (sample,) = record.samples
    assert record.messages is not None
    start, _ = sample.loss_spans[1]
    sample.token_ids[start:] = [Target.read(target).get("eos_token_id")]
    sample.loss_spans[1:] = [(start, start + 1)] if supervise_end else []
    record.messages[-1]["content"] = ""
    assert verify().returncode == 0
    assert json.loads((tmp_path / "verified.json").read_text())["text_equal"] == 2
    record.messages[-1]["content"] = "more"
    assert "found 1 of 2 turns" in verify().stderr
    record.messages[-1]["content"] = ""
    sample.loss_spans[:1] = []  # the first reply has tokens of its own: it cannot be without a span
    assert "found 1 of 2 turns" in verify().stderr

"""Claims about synthesis: exactly once a row whatever is killed, failures counted, samples as the server had them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, kill_when, read_lines, run

from contracts.conversation import read_conversations
from synth.conversation import add_turn, make_reply

FILE = "conversations.jsonl"


def write_prompts(path: Path, questions: list[str | list[str]]) -> Path:
    rows = [{"turns": [q] if isinstance(q, str) else q} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(recipe: Path, prompts: Path, output: Path, endpoint: str, *more: str, check: bool = True) -> Any:
    args = ("--recipe", recipe, "--prompts", prompts, "--output", output, "--endpoint", endpoint, *more)
    return run("synth", "generate", *args, check=check)


def grown_by(path: Path, num_bytes: int) -> Callable[[], bool]:
    """Whether a file has grown by so much since now."""
    enough = num_bytes + (path.stat().st_size if path.exists() else 0)
    return lambda: path.exists() and path.stat().st_size >= enough


def test_killed_at_any_moment_and_run_again_it_equals_an_uninterrupted_run(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    questions: list[str | list[str]] = [f"question {i}" if i % 3 else [f"first {i}", f"second {i}"] for i in range(400)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", questions)
    generate(recipe_path, prompts, tmp_path / "whole", scripted_server)

    output = tmp_path / "killed"
    args = ["synth", "generate", "--recipe", recipe_path, "--prompts", prompts, "--output", output]
    args += ["--endpoint", scripted_server]
    rng = random.Random(0)
    kills = sum(kill_when(grown_by(output / FILE, rng.randrange(1, 12000)), *args) == -9 for _ in range(6))
    assert kills >= 3
    generate(recipe_path, prompts, output, scripted_server)

    whole, killed = read_lines(tmp_path / "whole" / FILE), read_lines(output / FILE)
    assert len(killed) == len({row["id"] for row in killed}) == 400
    assert sorted(killed, key=lambda row: row["index"]) == sorted(whole, key=lambda row: row["index"])
    assert json.loads((output / "run.json").read_text())["summary"]["done"] == 400
    assert "is finished, skipped" in generate(recipe_path, prompts, output, scripted_server).stdout


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_it_cleanly_and_say_how_to_go_on(
    recipe_path: Path, scripted_server: str, tmp_path: Path, signal_number: int
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [f"question {i}" for i in range(400)])
    args = ("--recipe", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", scripted_server)
    process = subprocess.Popen(command("synth", "generate", *args), stderr=subprocess.PIPE, text=True)
    while len(read_lines(tmp_path / "out/ledger.jsonl")) < 20:
        assert process.poll() is None
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith("run the same command again to go on")
    assert "Traceback" not in errors
    generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    assert len({row["id"] for row in read_lines(tmp_path / "out" / FILE)}) == 400


def test_a_record_that_was_written_but_not_accounted_for_is_written_again(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [f"q{i}" for i in range(5)])
    generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    ledger = tmp_path / "out/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-4])  # as if the process had died inside its last ledger line
    generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    assert len(read_lines(tmp_path / "out" / FILE)) == 5
    assert len({record.id for record in read_conversations(tmp_path / "out")}) == 5


def test_every_row_is_accounted_for_and_failures_can_be_tried_again(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"q{i}"} for i in range(30)] + [{"prompt": "fail 400"}, {"prompt": "endless"}, {"no": "prompt"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    summary = json.loads((tmp_path / "out/run.json").read_text())["summary"]
    counts = {key: summary[key] for key in ("done", "truncated", "filtered", "failed", "input")}
    assert counts == {"done": 30, "truncated": 1, "filtered": 1, "failed": 1, "input": 33}
    assert "--retry-failed" in result.stdout
    failed = [line for line in read_lines(tmp_path / "out/ledger.jsonl") if line["status"] == "failed"]
    assert "scripted refusal" in failed[0]["reason"]
    generate(recipe_path, prompts, tmp_path / "out", scripted_server, "--retry-failed")
    lines = read_lines(tmp_path / "out/ledger.jsonl")
    assert [line["id"] for line in lines if line["status"] == "failed"] == [failed[0]["id"]] * 2


def test_too_many_failures_stop_with_exit_code_1_and_the_reason(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["good", "fail 400"])
    result = generate(recipe_path, prompts, tmp_path / "out", scripted_server, check=False)
    assert result.returncode == 1
    assert "found 1 of 2 rows failed" in result.stderr
    again = generate(recipe_path, prompts, tmp_path / "out", scripted_server, check=False)
    assert again.returncode == 1  # it is not taken for finished
    assert len(read_lines(tmp_path / "out" / FILE)) == 1


def test_a_server_that_parses_thoughts_away_is_refused(recipe_path: Path, scripted_server: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["reasoning"])
    result = generate(recipe_path, prompts, tmp_path / "out", scripted_server, check=False)
    assert result.returncode == 2
    assert "--reasoning-parser" in result.stderr


def test_a_server_without_token_ids_is_refused(recipe_path: Path, scripted_server: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["no ids"])
    result = generate(recipe_path, prompts, tmp_path / "out", scripted_server, check=False)
    assert result.returncode == 2
    assert "no token ids" in result.stderr


def test_an_unreachable_endpoint_is_one_line(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["q"])
    result = generate(recipe_path, prompts, tmp_path / "out", "http://127.0.0.1:9/v1", check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "http://127.0.0.1:9/v1: found" in result.stderr


def test_a_missing_prompt_file_is_one_line(recipe_path: Path, tmp_path: Path) -> None:
    result = generate(recipe_path, tmp_path / "none.jsonl", tmp_path / "out", "http://127.0.0.1:9/v1", check=False)
    assert result.returncode == 2
    assert "none.jsonl: found no such file" in result.stderr
    assert result.stderr.count("\n") == 1


def test_changed_prompts_are_refused_for_a_folder_that_was_begun(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    generate(recipe_path, write_prompts(tmp_path / "a.jsonl", ["q"]), tmp_path / "out", scripted_server)
    other = write_prompts(tmp_path / "b.jsonl", ["q", "r"])
    result = generate(recipe_path, other, tmp_path / "out", scripted_server, check=False)
    assert result.returncode == 2
    assert "inputs.prompts" in result.stderr


def test_an_appending_template_gives_one_sample_with_a_span_a_turn(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    generate(recipe_path, write_prompts(tmp_path / "p", [["one", "two"]]), tmp_path / "out", scripted_server)
    (record,) = read_conversations(tmp_path / "out")
    (sample,) = record.samples
    texts = [bytes(sample.token_ids[start : end - 1]).decode() for start, end in sample.loss_spans]
    assert texts == ["reply to one", "reply to two"]
    assert record.thinking_mode == "enabled"
    assert bytes(sample.token_ids[:9]).decode() == "<enabled>"


def test_a_rewriting_template_gives_each_rewritten_turn_a_sample_of_its_own(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p", [["rewrite one", "two", "three"]])
    generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    (record,) = read_conversations(tmp_path / "out")
    supervised = [
        bytes(sample.token_ids[start : end - 1]).decode()
        for sample in record.samples
        for start, end in sample.loss_spans
    ]
    assert len(record.samples) == 3
    assert supervised == ["reply to rewrite one", "reply to two", "reply to three"]


def test_a_turn_that_starts_with_the_sample_so_far_extends_it() -> None:
    samples: list[Any] = []
    add_turn(samples, [1, 2], [3, 9])
    add_turn(samples, [1, 2, 3, 9, 4], [5, 9])
    add_turn(samples, [1, 2, 7, 9, 4], [6])
    assert [sample.loss_spans for sample in samples] == [[(2, 4), (5, 7)], [(5, 6)]]
    assert samples[0].token_ids == [1, 2, 3, 9, 4, 5, 9]


def test_a_reply_is_split_at_its_thoughts_end_and_nothing_is_stripped() -> None:
    tags = ("<mm:think>", "</mm:think>")
    assert make_reply(" why \n</mm:think>\nso ", tags) == {
        "role": "assistant",
        "content": "\nso ",
        "reasoning_content": " why \n",
    }
    assert make_reply("<mm:think>a</mm:think>b</mm:think>c", tags)["content"] == "b</mm:think>c"
    assert make_reply("</mm:think>b", tags) == {"role": "assistant", "content": "b"}
    assert make_reply("b", tags) == {"role": "assistant", "content": "b"}

"""Claims about synthesis: exactly once a row whatever is killed, failures counted, samples as the server had them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import scripted
from conftest import command, kill_when, read_lines, run_here
from tokenizers import Tokenizer

from contracts.conversation import read_conversations
from serve.server import find_port
from synth.conversation import add_turn
from synth.reply import make_reply

FILE = "conversations.jsonl"


def write_prompts(path: Path, questions: list[str | list[str]]) -> Path:
    rows = [{"turns": [q] if isinstance(q, str) else q} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(recipe: Path, prompts: Path, output: Path, endpoint: str, *more: str, check: bool = True) -> Any:
    args = ("--recipe", recipe, "--prompts", prompts, "--output", output, "--endpoint", endpoint, *more)
    return run_here("synth", "generate", *args, check=check)


def grown_by(path: Path, num_bytes: int) -> Callable[[], bool]:
    """Whether a file has grown by so much since now."""
    enough = num_bytes + (path.stat().st_size if path.exists() else 0)
    return lambda: path.exists() and path.stat().st_size >= enough


@contextmanager
def server_process(fail_fraction: float = 0.0, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The scripted server as a process of its own, and its URL."""
    port = port or find_port("127.0.0.1", None)
    script = [sys.executable, scripted.__file__, str(port), str(fail_fraction)]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kills", "rows"), [(10, 400), pytest.param(50, 2000, marks=pytest.mark.rare)])
def test_after_kills_over_a_failing_server_it_equals_an_uninterrupted_run(
    recipe_path: Path, tmp_path: Path, kills: int, rows: int
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(prompts, [[f"first {i}", f"second {i}", *([f"third {i}"] if i % 3 else [])] for i in range(rows)])
    with prompts.open("a") as file:
        file.write('{"no": "prompt"}\n{"turns": ["first 0", "second 0", "third 0", "endless"]}\nno json\n')
    with server_process() as (url, _):
        generate(recipe_path, prompts, tmp_path / "whole", url)

    output = tmp_path / "killed"
    args = ["synth", "generate", "--recipe", recipe_path, "--prompts", prompts, "--output", output]
    rng = random.Random(0)
    with server_process(fail_fraction=0.05) as (url, _):
        for _ in range(kills):
            # At any moment: before its first record, between records, inside of one.
            moment = grown_by(output / FILE, rng.randrange(0, 1500 * rows // kills))
            assert kill_when(moment, *args, "--endpoint", url) == -9
        generate(recipe_path, prompts, output, url)
        assert "is finished, skipped" in generate(recipe_path, prompts, output, url).stdout

    whole, killed = read_lines(tmp_path / "whole" / FILE), read_lines(output / FILE)
    assert len(killed) == len({row["id"] for row in killed}) == rows + 1
    assert sorted(killed, key=lambda row: row["index"]) == sorted(whole, key=lambda row: row["index"])
    summary = json.loads((output / "run.json").read_text())["summary"]
    assert {key: summary[key] for key in ("done", "truncated", "filtered", "failed", "input")} == {
        "done": rows, "truncated": 1, "filtered": 2, "failed": 0, "input": rows + 3,
    }  # fmt: skip
    assert [row["index"] for row in read_lines(output / "rejects.jsonl")] == [rows, rows + 2]
    assert (output / FILE).read_bytes().count(b"\n") == rows + 1


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_drain_what_is_in_flight_and_say_how_to_go_on(
    recipe_path: Path, scripted_server: str, tmp_path: Path, signal_number: int
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [f"slow {i}" for i in range(8)] + ["never begun"] * 1)
    args = ("--recipe", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", scripted_server)
    process = subprocess.Popen(command("synth", "generate", *args), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not (tmp_path / "out/run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping; 8 conversations have 20 s to end" in errors
    assert errors.rstrip().endswith("run the same command again to go on")
    assert "Traceback" not in errors
    assert len(read_lines(tmp_path / "out" / FILE)) == 8
    generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    assert len({row["id"] for row in read_lines(tmp_path / "out" / FILE)}) == 9


def test_what_does_not_end_in_time_is_cut_off_and_written_by_the_next_run(
    recipe_path: Path, scripted_server: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["slow one"])
    args = ("--recipe", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", scripted_server)
    more = ("--set", "synth.drain_timeout_s=0.1")
    process = subprocess.Popen(command("synth", "generate", *args, *more), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out/run.json").exists():
        time.sleep(0.01)
    time.sleep(1.0)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert read_lines(tmp_path / "out" / FILE) == []
    generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    assert len(read_lines(tmp_path / "out" / FILE)) == 1


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


def test_rows_of_a_server_without_token_ids_are_rendered_in_their_mode_and_marked(
    recipe_path: Path, target_folder: Path, scripted_server: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [["no ids one", "no ids two"], "with ids"])
    result = generate(recipe_path, prompts, tmp_path / "out", scripted_server)
    assert "1 rendered" in result.stdout
    first, second = sorted(read_conversations(tmp_path / "out"), key=lambda record: record.index)
    assert (first.rendered, second.rendered) == (True, False)
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    spans = [(sample, span) for sample in first.samples for span in sample.loss_spans]
    texts = [tokenizer.decode(sample.token_ids[a:b], skip_special_tokens=False) for sample, (a, b) in spans]
    assert texts == ["reply to no ids one[e~[", "reply to no ids two[e~["]
    context = tokenizer.decode(
        first.samples[0].token_ids[: first.samples[0].loss_spans[0][0]], skip_special_tokens=False
    )
    assert "Thinking mode: enabled" in context
    assert context.endswith("]~b]ai\n<mm:think>")


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
    assert make_reply("</mm:think>b", None)["content"] == "</mm:think>b"

"""Claims about faults: what is retried, what is refused, where requests go when a server fails, when a run stops."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import scripted
from conftest import command, read_lines, run_here

from common.errors import IncompleteError
from recipe.synth import SynthSection
from serve.client import _retry_after
from serve.endpoints import Endpoints, PromptTooLongError, RequestError
from serve.server import find_port
from synth.pace import Pace

FAST = SynthSection(temperature=0.0, backoff_s=0.01, patience_s=0.5)


def pool(*urls: str, settings: SynthSection = FAST) -> Endpoints:
    return Endpoints(urls, settings, stage="synth", max_connections=256)


def ask(*urls: str, text: str = "hello", settings: SynthSection = FAST, times: int = 1) -> tuple[list[Any], Endpoints]:
    """The answers to a message sent `times` at once, exceptions among them."""

    async def main() -> tuple[list[Any], Endpoints]:
        async with pool(*urls, settings=settings) as endpoints:
            body = {"messages": [{"role": "user", "content": text}], "return_token_ids": True}
            calls = [endpoints.chat(body) for _ in range(times)]
            return await asyncio.gather(*calls, return_exceptions=True), endpoints

    return asyncio.run(main())


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_every_kind_of_passing_fault_is_retried() -> None:
    with scripted.serve(fail_fraction=0.3) as server:
        answers, endpoints = ask(server.url, times=200, settings=FAST.model_copy(update={"max_attempts": 20}))
        assert all(answer[0]["choices"] for answer in answers)
        assert set(server.faults) == {"500", "429", "503", "dropped", "broken"}
        assert endpoints.num_retries == server.faults.total()


def test_a_fault_that_stays_fails_with_its_reason_and_the_number_of_tries() -> None:
    with scripted.serve() as server:
        ((error,), _) = ask(server.url, text="fail 500", settings=FAST.model_copy(update={"max_attempts": 3}))
        assert isinstance(error, RequestError)
        assert str(error) == "HTTP 500: scripted failure (3 tries)"
        assert len(server.requests) == 3


def test_a_refusal_is_not_repeated() -> None:
    with scripted.serve() as server:
        ((error,), _) = ask(server.url, text="fail 400")
        assert isinstance(error, RequestError)
        ((error,), _) = ask(server.url, text="too long")
        assert isinstance(error, PromptTooLongError)
        assert len(server.requests) == 2


def test_a_request_that_json_cannot_hold_fails_its_row_alone(recipe_path: Path, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"maximum": 2**70}}}]
    rows = [{"prompt": "a", "tools": tools}, {"prompt": "b"}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with scripted.serve() as server:
        args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url)
        run_here("synth", "generate", *args, "--set", "synth.max_failed_fraction=1")
    statuses = {line["index"]: line["status"] for line in read_lines(tmp_path / "out/ledger.jsonl")}
    assert statuses == {0: "failed", 1: "done"}


def test_a_slow_answer_is_a_time_out_that_is_retried() -> None:
    with scripted.serve() as server:
        settings = FAST.model_copy(update={"request_timeout_s": 0.2, "max_attempts": 2})
        ((error,), _) = ask(server.url, text="slow", settings=settings)
        assert "TimeoutError" in str(error)
        assert "2 tries" in str(error)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _retry_after("2.5") == 2.5
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
    assert _retry_after("soon") == _retry_after(None) == 0.0


def test_requests_go_to_the_least_loaded_server_and_around_one_that_is_down() -> None:
    with scripted.serve() as one, scripted.serve() as two:
        ask(one.url, two.url, times=40)
        assert abs(len(one.requests) - len(two.requests)) <= 2
        dead = f"http://127.0.0.1:{find_port('127.0.0.1', None)}/v1"
        answers, _ = ask(dead, one.url, times=10)
        assert all(answer[1].url == one.url for answer in answers)


def test_a_server_that_fails_at_once_draws_no_requests_from_a_good_one() -> None:
    with scripted.serve() as good, scripted.serve(fail_fraction=1.0) as bad:
        answers, _ = ask(bad.url, good.url, times=300)
        assert all(answer[1].url == good.url for answer in answers)


def test_a_failing_server_is_set_aside_and_asked_again_until_it_is_back(capfd: pytest.CaptureFixture[str]) -> None:
    port = find_port("127.0.0.1", None)
    first = scripted.Server(port)
    revived: list[scripted.Server] = []

    async def main() -> int:
        async with pool(first.url, settings=FAST.model_copy(update={"patience_s": 20})) as endpoints:
            body = {"messages": [{"role": "user", "content": "hello"}]}
            await endpoints.chat(body)
            first.stop()
            threading.Timer(1.0, lambda: revived.append(scripted.Server(port))).start()
            answers = await asyncio.gather(*(endpoints.chat(body) for _ in range(20)))
            return len(answers)

    assert asyncio.run(main()) == 20
    assert "is set aside" in (told := capfd.readouterr().out)
    assert "is back" in told
    revived[0].stop()


def test_servers_that_do_not_come_back_stop_the_run_and_no_row_fails_for_it() -> None:
    server = scripted.Server()

    async def main() -> None:
        async with pool(server.url) as endpoints:
            server.stop()
            await endpoints.chat({"messages": [{"role": "user", "content": "hello"}]})

    with pytest.raises(IncompleteError, match="no healthy server any more"):
        asyncio.run(main())


def test_a_wrong_key_is_told_at_once_and_the_key_itself_never(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", ["hello"])
    with scripted.serve(key="right-key") as server:
        args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
        result = run_here("synth", "generate", *args, check=False)
        assert result.returncode == 2
        assert "HTTP 401" in result.stderr
        monkeypatch.setenv("OPENAI_API_KEY", "right-key")
        run_here("synth", "generate", *args)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"right-key" not in written
    assert b"wrong-key" not in written


def test_a_server_without_a_tool_parser_is_asked_to_leave_the_reply_whole(recipe_path: Path, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"turns": ["no parser", "and"], "tools": tools}) + "\n")
    with scripted.serve() as server:
        args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url)
        printed = run_here("synth", "generate", *args).stdout
        assert [body.get("tool_choice") for body in server.requests] == [None, "none", None]
        assert all(body["tools"] == tools for body in server.requests)
    assert "the format of the target's tool calls is not known" in printed
    assert read_lines(tmp_path / "out/ledger.jsonl")[0]["status"] == "done"


def test_failures_in_a_row_stop_the_run_early(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [f"fail 400 {i}" for i in range(300)])
    more = ("--set", "synth.max_failures_in_row=10", "--set", "synth.max_failed_fraction=1")
    with scripted.serve() as server:
        args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url, *more)
        result = run_here("synth", "generate", *args, check=False)
        assert result.returncode == 1
        assert "10 failures in a row" in result.stderr
        assert "--retry-failed" in result.stderr
        assert len(server.requests) < 40


def test_too_large_a_fraction_of_failures_stops_the_run_early(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [f"fail 400 {i}" if i % 2 else f"{i}" for i in range(400)])
    more = ("--set", "synth.max_failures_in_row=10", "--set", "synth.max_failed_fraction=0.1")
    with scripted.serve() as server:
        args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url, *more)
        result = run_here("synth", "generate", *args, check=False)
        assert result.returncode == 1
        assert "of 400 rows failed" in result.stderr
        assert len(server.requests) < 200


def test_a_server_that_dies_and_comes_back_costs_no_row(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [f"question {i}" for i in range(600)])
    port = find_port("127.0.0.1", None)
    first = scripted.Server(port)
    args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", first.url)
    process = subprocess.Popen(command("synth", "generate", *args), stdout=subprocess.PIPE, text=True)
    while len(read_lines(tmp_path / "out/ledger.jsonl")) < 50:
        assert process.poll() is None
        time.sleep(0.01)
    first.stop()
    time.sleep(1.0)
    with scripted.serve(port):
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert len({row["id"] for row in read_lines(tmp_path / "out/conversations.jsonl")}) == 600


def test_concurrency_follows_the_server_between_floor_and_ceiling() -> None:
    pace = Pace.make(SynthSection(temperature=0.0, min_concurrency=4, max_concurrency=64))
    limits = []
    for running, waiting in [(4, 0), (8, 0), (16, 0), (20, 12), (20, 2), (20, 0)]:
        pace.observe(pace.limit, running, waiting)
        limits.append(pace.limit)
    assert limits == [8, 16, 32, 22, 22, 44]
    for _ in range(9):
        pace.observe(pace.limit, 60, 0)
    assert pace.limit == 64
    pace.observe(64, 0, 500)
    assert pace.limit == 4
    fixed = Pace.make(SynthSection(temperature=0.0, concurrency=7))
    assert fixed.fixed
    assert fixed.limit == 7


def test_a_run_raises_its_concurrency_while_nothing_waits_and_keeps_it_while_much_does(
    recipe_path: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [f"slow {i}" for i in range(24)])
    more = ("--set", "synth.concurrency=null", "--set", "synth.min_concurrency=2")
    for name, gauges, expected in (("idle", (2, 0), range(8, 25)), ("busy", (2, 50), range(2, 3))):
        with scripted.serve() as server:
            server.gauges = gauges
            few = write_prompts(tmp_path / "few.jsonl", [f"slow {i}" for i in range(6)]) if name == "busy" else prompts
            args = ("-r", recipe_path, "--prompts", few, "--output", tmp_path / name, "--endpoint", server.url, *more)
            run_here("synth", "generate", *args)
            assert server.most_in_flight in expected
            line = read_lines(tmp_path / name / "metrics.jsonl")[-1]
            assert line["running"] == 2
            assert line["done"] == line["rows"] == line["rows_expected"]

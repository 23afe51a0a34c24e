"""Claims about sending held-out turns: progress is visible in a log, answers come in the order of the turns."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import bench.requests
from bench.requests import Served, Turn, read_turns, refuse_min_p, send_all
from common.errors import UserError
from common.progress import Progress
from contracts.conversation import Conversation, Sample


class Handler(BaseHTTPRequestHandler):
    """Answers a completion with its prompt's last token."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": body["prompt"][-1:]}
        data = json.dumps({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Served]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield Served(f"http://127.0.0.1:{running.server_port}", "m")
        running.shutdown()
        thread.join()


def test_progress_is_plain_lines_without_a_terminal(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.requests, "Progress", partial(Progress, line_interval_s=0.0))
    turns = [Turn(f"t{n}-0-1", "", "", [1, n], []) for n in range(3)]
    answers, _ = asyncio.run(send_all(server, turns, concurrency=2, max_tokens=8, title="K = 3, gsm8k"))
    assert [answer.token_ids for answer in answers] == [[0], [1], [2]]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("K = 3, gsm8k: 1/3 [")
    assert lines[-1].startswith("K = 3, gsm8k: 3/3 [")


def test_a_turn_is_sampled_as_it_was_recorded() -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1,
                "presence_penalty": 0.5, "frequency_penalty": 0.2}  # fmt: skip
    record = Conversation(
        id="a" * 32, source_id="s", index=0, samples=[Sample(token_ids=[1, 2, 3], loss_spans=[(1, 3)])],
        finish_reason="stop", sampling={**sampling, "seed": 7, "max_tokens": 9}, target={}, template="", usage={},
    )  # fmt: skip
    (turn,) = read_turns([record])
    assert turn.sampling == sampling
    with pytest.raises(UserError, match="runs/synth: found replies sampled with min_p"):
        refuse_min_p("runs/synth", [turn])

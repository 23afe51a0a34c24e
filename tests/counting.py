"""A server that counts as vLLM does, cards whose figures it may have, and how `bench watch` looks at it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench.card import Card, Filters
from bench.watch import Settings
from contracts.certificate import AcceptanceRow

PER_POSITION = [0.7, 0.5, 0.3]
STEPS = 5000


@dataclass
class Metrics:
    """The counters of a vLLM server; each of its requests has 20 steps."""

    steps: int = 0
    drafted: int = 0
    accepted: list[int] = field(default_factory=lambda: [0] * len(PER_POSITION))
    created: float = 1.7e9
    running: int = 0

    def serve(self, steps: int = STEPS, scale: float = 1.0, draft_tokens: int | None = None) -> None:
        """Count the steps of finished requests with the card's shares times `scale`, of so many draft tokens."""
        draft_tokens = draft_tokens or len(self.accepted)
        self.steps += steps
        self.drafted += steps * draft_tokens
        for place, share in enumerate(PER_POSITION[:draft_tokens]):
            self.accepted[place] += round(share * scale * steps)

    def restart(self, num_draft_tokens: int = len(PER_POSITION)) -> None:
        self.steps, self.drafted, self.accepted = 0, 0, [0] * num_draft_tokens
        self.created += 60

    def text(self) -> str:
        def counter(name: str, value: float, label: str = "") -> list[str]:
            return [
                f"# TYPE vllm:{name}_total counter",
                f'vllm:{name}_total{{engine="0"{label}}} {float(value)}',
                f"# TYPE vllm:{name}_created gauge",
                f'vllm:{name}_created{{engine="0"{label}}} {self.created}',
            ]

        requests = self.steps // 20
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self.running}',
            f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1"}} {requests}',
            f'vllm:time_to_first_token_seconds_count{{engine="0"}} {requests}',
            *counter("generation_tokens", requests + self.steps + sum(self.accepted)),
            *counter("spec_decode_num_drafts", self.steps),
            *counter("spec_decode_num_draft_tokens", self.drafted),
            *counter("spec_decode_num_accepted_tokens", sum(self.accepted)),
        ]
        for place, count in enumerate(self.accepted):
            lines += counter("spec_decode_num_accepted_tokens_per_pos", count, f',position="{place}"')
        return "\n".join(lines) + "\n"


class Server(ThreadingHTTPServer):
    """Serves `script`, the status and body of each GET of /metrics in turn; the last one stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.metrics = Metrics()
        self.script: list[Callable[[], tuple[int, str]]] = []
        self.keys: list[str | None] = []
        self.accepted: list[int] | None = [3, 1, 0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def good(self, **served: Any) -> Callable[[], tuple[int, str]]:
        """An answer after the server has served so much more."""

        def answer() -> tuple[int, str]:
            self.metrics.serve(**served)
            return 200, self.metrics.text()

        return answer


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/metrics":
            step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            return self._answer(*step())
        self.server.keys.append(self.headers["Authorization"])
        return self._answer(200, json.dumps({"data": [{"id": "target"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            mode = str((body.get("chat_template_kwargs") or {}).get("thinking_mode"))
            return self._answer(200, json.dumps({"tokens": list(f"{mode} {body['messages'][-1]['content']}".encode())}))
        found = self.server.accepted
        token_ids = [1] * (1 + sum(a + 1 for a in found or [0]))
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": token_ids}
        metrics = {"speculative_decoding": {"per_step_accepted": found}} if found else None
        return self._answer(200, json.dumps({"choices": [choice], "metrics": metrics}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        return


@contextmanager
def run_server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def make_row(**changes: Any) -> AcceptanceRow:
    values = {
        "set": "held_out", "thinking_mode": "enabled", "temperature": 0.0, "num_draft_tokens": 3,
        "acceptance_length": 2.5, "interval": (2.4, 2.6), "per_position": PER_POSITION, "steps": 4000, "n": 200,
    }  # fmt: skip
    return AcceptanceRow(**{**values, **changes})


def make_card(*rows: AcceptanceRow, **recipe: Any) -> Card:
    return Card("tiny-draft", "d" * 64, "served", list(rows or (make_row(),)), recipe)


def settings(server: Server, **changes: Any) -> Settings:
    values = {"every_s": 0.01, "once": True, "rate": 0.001, "min_drafts": 1000}
    return Settings(server.url, Path("card"), Filters(), **{**values, **changes})

"""A server on loopback that answers chat completions as vLLM does, instantly and by rule.

It exists for faults that a real server cannot be made to show on time, and for speed where the engine is not the
matter. The "tokens" of a text are its bytes. The last user message may ask for a fault or a manner:

    fail 500, fail 400, reasoning, no ids, too long, endless (cut at max_tokens), loop, slow (2 s),
    rewrite (a template that rewrites history), call NAME (a tool call), no parser (tools refused),
    finish REASON (a reply that the server broke off), token ID (a reply with this token at its end)

With `extract`, completions of token ids write hidden states there, as vLLM's extraction does.

    python tests/scripted.py PORT [FAIL_FRACTION]      the same as a process of its own
"""

from __future__ import annotations

import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

END = 255
DELAY_S = 0.01


def render(messages: list[dict[str, Any]], mode: str) -> list[int]:
    """Append-only, unless a message says "rewrite": then earlier replies are shortened."""
    rewrites = any("rewrite" in (message.get("content") or "") for message in messages)
    ids = list(f"<{mode}>".encode())
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"][:3] if rewrites else message["content"]
            thought = message.get("reasoning_content")
            text = f"<mm:think>{thought}</mm:think>{content}" if thought else content
            ids += [*f"[ai]{text}".encode(), END]
        else:
            ids += [*f"[{message['role']}]{message['content']}".encode(), END]
    return [*ids, *b"[ai]"]


class Server(ThreadingHTTPServer):
    """The server; `fail_fraction` of its answers are faults of all kinds, in turn."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0, fail_fraction: float = 0.0, key: str = "") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.fail_fraction = fail_fraction
        self.key = key
        self.healthy = False  # then no message fails
        self.extract: Path | None = None
        self.states = (3, 64)  # of one token
        self.names: str | None = None  # the file that completions name instead of their own
        self.num_torn = 0  # so many completions leave a torn file
        self.num_answered: int | None = None  # later completions are never answered
        self.gauges: tuple[int, int] | None = None
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self._random = random.Random(port)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        """As if the process had died: open connections break, too."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no news."""

    def draw_fault(self) -> str:
        if self._random.random() >= self.fail_fraction:
            return ""
        with self.lock:
            fault = ("500", "429", "503", "dropped", "broken")[sum(self.faults.values()) % 5]
            self.faults[fault] += 1
        return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    is_counted = False
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        if self.path == "/metrics":
            if self.server.gauges is None:
                return self._answer(404, {})
            running, waiting = self.server.gauges
            lines = [
                "# TYPE vllm:num_requests_running gauge",
                f'vllm:num_requests_running{{engine="0"}} {running}',
                "# TYPE vllm:num_requests_waiting gauge",
                f'vllm:num_requests_waiting{{engine="0"}} {waiting}',
            ]
            return self._answer(200, "\n".join(lines) + "\n")
        if self._is_refused():
            return self._answer(401, {"error": {"message": "Unauthorized"}})
        return self._answer(200, {"data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        self.is_counted = True
        try:
            self._complete(body) if self.path.endswith("/chat/completions") else self._extract(body)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Before the answer is sent: the client's next request may be here before this thread runs again."""
        with self.server.lock:
            self.server.in_flight -= self.is_counted
        self.is_counted = False

    def _complete(self, body: dict[str, Any]) -> None:
        if self._is_refused():
            return self._answer(401, {"error": {"message": "Unauthorized"}})
        if self.server.healthy:
            return self._answer(200, reply_to(body, "healthy"))
        said = [message["content"] for message in body["messages"] if message["role"] == "user"]
        last = said[-1] if said else ""
        time.sleep(2 if "slow" in last else DELAY_S)
        fault = self.server.draw_fault()
        if fault == "dropped":
            self.close_connection = True
            return self.connection.close()
        if fault == "broken":
            return self._answer(200, '{"choices": [')
        if fault == "429":
            return self._answer(429, {"error": {"message": "scripted overload"}}, {"Retry-After": "0.05"})
        if "fail 500" in last or fault:
            return self._answer(int(fault or 500), {"error": {"message": "scripted failure"}})
        if "fail 400" in last:
            return self._answer(400, {"error": {"message": "scripted refusal"}})
        if "too long" in last:
            text = "This model's maximum context length is 256 tokens. However, your prompt contains 300 input tokens"
            return self._answer(400, {"error": {"message": text}})
        if "no parser" in last and body.get("tool_choice") != "none":
            text = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
            return self._answer(400, {"error": {"message": text}})
        return self._answer(200, reply_to(body, last))

    def _extract(self, body: dict[str, Any]) -> None:
        if self.server.extract is None:
            return self._answer(400, {"error": {"message": "scripted refusal"}})
        with self.server.lock:
            held = self.server.num_answered == 0
            if self.server.num_answered:
                self.server.num_answered -= 1
            torn = self.server.num_torn > 0
            self.server.num_torn -= torn
        if held:
            threading.Event().wait()
        path = self.server.extract / f"cmpl-{body['request_id']}.safetensors"
        tensors = {
            "hidden_states": np.ones((len(body["prompt"]), *self.server.states), np.float32),
            "token_ids": np.array(body["prompt"], np.int64),
        }
        path.write_bytes(save(tensors)[: 100 if torn else None])
        Path(f"{path}.lock").touch()
        choice = {"index": 0, "text": "", "finish_reason": "length"}
        named = {"hidden_states_path": self.server.names or str(path)}
        return self._answer(200, {"choices": [choice], "kv_transfer_params": named})

    def _is_refused(self) -> bool:
        return bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}"

    def _answer(self, status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self._leave()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def reply_to(body: dict[str, Any], last: str) -> dict[str, Any]:
    """The answer of a server that is well."""
    values = body.get("chat_template_kwargs") or {}
    mode = str(next(iter(values.values()), ""))
    text = "ab" * 300 if "loop" in last else f"reply to {last}"
    finish = "length" if "endless" in last else "stop"
    if broken_off := re.search(r"finish (\w+)", last):
        finish = broken_off[1]
    message: dict[str, Any] = {"role": "assistant", "content": text}
    called = re.search(r"call (\w+)", last)
    if called and body["messages"][-1]["role"] != "tool":
        function = {"name": called[1], "arguments": '{"q": 1}'}
        message["tool_calls"] = [{"id": "call-7", "type": "function", "function": function}]
        finish = "tool_calls"
    if "reasoning" in last:
        message["reasoning"] = "a thought apart"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice]}
    if "no ids" not in last:
        answer["prompt_token_ids"] = render(body["messages"], mode)
        more = [int(id_) for id_ in re.findall(r"token (\d+)", last)]
        choice["token_ids"] = [*text.encode(), *more, *([END] if finish != "length" else [])]
    return answer


@contextmanager
def serve(port: int = 0, fail_fraction: float = 0.0, key: str = "") -> Iterator[Server]:
    server = Server(port, fail_fraction, key)
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    with serve(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0):
        print("ready", flush=True)
        time.sleep(3600)

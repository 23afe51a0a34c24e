"""A server on loopback that answers chat completions as vLLM does, instantly and by rule.

It exists for faults that a real server cannot be made to show on time, and for speed where the engine is not the
matter. The "tokens" of a text are its bytes. A user message may ask for a fault: "fail 500", "fail 400", "reasoning",
"no ids", "rewrite" (a template that rewrites history).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 255
DELAY_S = 0.01


def render(messages: list[dict[str, Any]], mode: str) -> list[int]:
    """Append-only, unless the first user message says "rewrite": then earlier replies are shortened."""
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        last = body["messages"][-1]["content"]
        time.sleep(DELAY_S)
        if "fail 500" in last:
            return self._answer(500, {"error": {"message": "scripted failure"}})
        if "fail 400" in last:
            return self._answer(400, {"error": {"message": "scripted refusal"}})
        mode = (body.get("chat_template_kwargs") or {}).get("thinking_mode", "")
        text = f"reply to {last}"
        finish = "length" if "endless" in last else "stop"
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if "reasoning" in last:
            message["reasoning"] = "a thought apart"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice]}
        if "no ids" not in last:
            answer["prompt_token_ids"] = render(body["messages"], mode)
            choice["token_ids"] = [*text.encode(), *([END] if finish == "stop" else [])]
        return self._answer(200, answer)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()

"""Answer chat completions immediately, to measure the cost of a client alone.

    python benchmarks/zero_latency.py PORT

Every answer is the same: 50 prompt ids and 100 reply ids, as vLLM returns them with `return_token_ids`. GET /seen
returns how many completions were asked for since the last call, and the body of the last request.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

NUM_PROMPT_TOKENS, NUM_REPLY_TOKENS = 50, 100

ANSWER = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "target",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * NUM_REPLY_TOKENS},
                "finish_reason": "stop",
                "token_ids": list(range(1000, 1000 + NUM_REPLY_TOKENS)),
            }
        ],
        "usage": {"prompt_tokens": NUM_PROMPT_TOKENS, "completion_tokens": NUM_REPLY_TOKENS, "total_tokens": 150},
        "prompt_token_ids": list(range(NUM_PROMPT_TOKENS)),
    }
).encode()
MODELS = b'{"object": "list", "data": [{"id": "target", "object": "model"}]}'


@dataclass
class Seen:
    """The number of requests for completions since it was last asked for, and the body of the last one."""

    posts: int = 0
    body: bytes = b""

    def take(self) -> bytes:
        taken = json.dumps({"posts": self.posts, "body": self.body.decode()}).encode()
        self.posts, self.body = 0, b""
        return taken


def _respond(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


class Connection(asyncio.Protocol):
    """The part of HTTP/1.1 that the two measured clients need."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            body, self._data = self._data[end + 4 : end + 4 + length], self._data[end + 4 + length :]
            if head.startswith(b"post"):
                self._seen.posts += 1
                self._seen.body = body
                answer = _respond(ANSWER)
            elif head.startswith(b"get /seen"):
                answer = _respond(self._seen.take())
            elif b"/metrics" in head.split(b"\r\n", 1)[0]:
                answer = _respond(b"", b"404 Not Found")
            else:
                answer = _respond(MODELS)
            self._transport.write(answer)  # type: ignore[attr-defined]


async def main(port: int) -> None:
    seen = Seen()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(seen), "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

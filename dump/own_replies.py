"""Samples for a preflight without conversations: greedy replies that a running server writes itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from contracts.conversation import Conversation, Sample
from dump.samples import Row
from serve.client import AnswerError, Client, ask

PROMPTS = (
    "Explain to a colleague how a hash table finds a key, what happens when two keys collide, and when it grows.",
    "Write a short story about a lighthouse keeper who receives a letter every winter.",
    "def merge_sorted(left, right):\n    ",
    "Die Hauptstadt von Frankreich ist",
)
REPLY_TOKENS = 48
TIMEOUT_S = 120.0


@contextmanager
def own_replies(url: str, folder: Path) -> Iterator[list[Row]]:
    """Yield a row for each of PROMPTS, answered greedily by the server at `url` (ending in /v1).

    The server writes the states of these requests, too: at the end they are deleted from `folder`. Raises UserError if
    it does not answer with token ids.
    """
    prefix = f"own-{uuid.uuid4().hex}"
    try:
        yield _ask_for_replies(url, prefix)
    finally:
        for path in folder.glob(f"*{prefix}*"):
            path.unlink(missing_ok=True)


def _ask_for_replies(url: str, prefix: str) -> list[Row]:
    try:
        return ask(lambda client: _ask_all(client, url, prefix))
    except (AnswerError, LookupError, TypeError) as error:
        raise UserError(
            url, found=f"no reply with token ids ({error})", expected="a vLLM server", fix="Look at the server's log."
        ) from None


async def _ask_all(client: Client, url: str, prefix: str) -> list[Row]:
    model = await client.read_model(url)
    bodies = [
        {"model": model, "prompt": prompt, "request_id": f"{prefix}-{number}"} for number, prompt in enumerate(PROMPTS)
    ]
    return [await _ask(client, url, body, number) for number, body in enumerate(bodies)]


async def _ask(client: Client, url: str, request: dict[str, str], number: int) -> Row:
    body = {
        **request,
        "max_tokens": REPLY_TOKENS,
        "temperature": 0.0,
        "repetition_penalty": 1.0,  # the target's generation_config may set another
        "return_token_ids": True,
    }
    choice = (await client.complete(url, body, TIMEOUT_S))["choices"][0]
    prompt_ids, reply = list(choice["prompt_token_ids"]), list(choice["token_ids"])
    sample = Sample(token_ids=prompt_ids + reply, loss_spans=[(len(prompt_ids), len(prompt_ids) + len(reply))])
    conversation = Conversation(
        id=f"{number:032x}",
        source_id="preflight",
        index=number,
        samples=[sample],
        finish_reason=choice["finish_reason"],
        sampling={"temperature": 0.0},
        target={},
        template="",
        usage={},
    )
    return Row(f"{conversation.id}-0", conversation, sample)

"""Read what a running vLLM server has counted since its start, and what it counted between two reads.

Reads: GET /metrics. Of vLLM's metrics (vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py, 0.32):
       `spec_decode_*`; `generation_tokens`, which ends with a reply, as `spec_decode_*` does not; the count of
       `time_to_first_token_seconds`, one for each request; the gauge `num_requests_running`.

A restarted server counts from 0. It is found by the time its counters were created, or by one that fell.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.drift import Counts
from common.errors import DraftlineError, UserError
from serve.client import AnswerError, ask, parse_metrics, to_counters

CREATED = re.compile(r"^vllm:spec_decode_num_drafts_created(?:{.*})? (\S+)", re.MULTILINE)
NOT_OURS = (401, 403, 404, 405)
"""HTTP statuses of /metrics that a later read cannot mend."""


class CannotSayError(DraftlineError):
    """Nothing can be said about the acceptance: the server did not answer, or there is no room for the report."""

    exit_code = 3


@dataclass(frozen=True)
class Read:
    """The counters at one time. `first_tokens` and `tokens` are None on servers without these metrics.

    `drafted`: draft tokens of all steps. `created`: when the counters began, if the server tells.
    """

    time: float
    created: float | None
    steps: int
    drafted: int
    accepted_at: tuple[int, ...]
    running: int
    first_tokens: int | None
    tokens: int | None

    @classmethod
    def parse(cls, text: str, where: object) -> Read:
        """Parse the text of /metrics. Raises UserError for a server without speculative decoding, or not of vLLM."""
        counters = to_counters(parse_metrics(text, "spec_decode_"))
        num_positions = sum(name.startswith("accepted_at_") for name in counters)
        if not num_positions:
            is_vllm = "vllm:" in text
            raise UserError(
                where,
                found="a vLLM server without speculative decoding" if is_vllm else "no metrics of vLLM",
                expected="vllm:spec_decode_num_drafts and its like",
                fix="Start the server with the draft (`serve start --draft`)."
                if is_vllm
                else "Give the URL of a vLLM server that runs without --disable-log-stats.",
            )
        created = [float(value) for value in CREATED.findall(text)]
        first, tokens = parse_metrics(text, "time_to_first_token_seconds_"), parse_metrics(text, "generation_tokens")
        return cls(
            time=time.time(),
            created=max(created, default=None),
            steps=int(counters["num_drafts"]),
            drafted=int(counters["num_draft_tokens"]),
            accepted_at=tuple(int(counters.get(f"accepted_at_{place}", 0)) for place in range(num_positions)),
            running=int(parse_metrics(text, "num_requests_running").get("", 0)),
            first_tokens=int(first["count"]) if "count" in first else None,
            tokens=int(tokens[""]) if "" in tokens else None,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Read:
        return cls(**{**values, "accepted_at": tuple(values["accepted_at"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def restarted_since(self, before: Read) -> bool:
        """Return whether the server started after the read `before`."""
        if None not in (self.created, before.created) and self.created != before.created:
            return True
        fell = [now < then for now, then in zip(self._numbers(), before._numbers(), strict=False)]
        return any(fell) or len(self.accepted_at) != len(before.accepted_at)

    def at_start(self) -> Read:
        """Return the counters as they were when this process started."""
        return replace(
            self,
            steps=0,
            drafted=0,
            accepted_at=(0,) * len(self.accepted_at),
            running=0,
            first_tokens=None if self.first_tokens is None else 0,
            tokens=None if self.tokens is None else 0,
        )

    def since(self, before: Read) -> Counts:
        """Return what the same process counted after `before`.

        A request that was running at `before` counts as one of these requests. Tokens beyond the end of a reply: a
        request with S steps that accepted A tokens gives 1 + S + A tokens, less what its end cuts off. If the reply
        ends with an accepted token, that is the bonus token alone, so the difference is an upper bound.
        """
        steps = self.steps - before.steps
        accepted_at = tuple(now - then for now, then in zip(self.accepted_at, before.accepted_at, strict=True))
        requests = beyond = None
        if self.first_tokens is not None and before.first_tokens is not None:
            first = self.first_tokens - before.first_tokens
            requests = first + before.running
            if self.tokens is not None and before.tokens is not None:
                beyond = max(0, first + steps + sum(accepted_at) - (self.tokens - before.tokens))
        return Counts(steps, accepted_at, requests, beyond, self.drafted - before.drafted)

    def _numbers(self) -> list[int]:
        return [self.steps, *self.accepted_at, self.first_tokens or 0, self.tokens or 0]


def read_server(url: str) -> Read:
    """Read a server's counters; `url` ends in /v1.

    Raises CannotSayError if it does not answer, UserError if it never will: see `Read.parse`.
    """
    where = f"{url.rstrip('/').removesuffix('/v1')}/metrics"
    try:
        text = ask(lambda client: client.read_metrics(url))
    except AnswerError as error:
        if error.status in NOT_OURS:
            raise UserError(
                where, found=str(error), expected="vLLM's metrics", fix="Give the URL of a vLLM server, ending in /v1."
            ) from None
        raise CannotSayError(f"{where}: found no answer ({error}), expected vLLM's metrics") from None
    try:
        return Read.parse(text, where)
    except (ValueError, OverflowError) as error:
        raise CannotSayError(f"{where}: found metrics that cannot be parsed ({error}), expected vLLM's") from None

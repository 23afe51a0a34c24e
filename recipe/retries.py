"""Retry and wait settings of the stages that send requests to servers."""

from __future__ import annotations

from common.section import Section, operational


class Retries(Section):
    """How often a stage tries a request, and how long it waits for a lost server."""

    max_attempts: int = operational(default=6, gt=0, description="attempts per request")
    backoff_s: float = operational(default=1.0, ge=0, description="wait before the second attempt; doubles, jittered")
    request_timeout_s: float = operational(default=1800.0, gt=0, description="per attempt")
    patience_s: float = operational(default=600.0, ge=0, description="how long to wait for a server to come back")

"""Fields that the stages which send requests to servers share: tries and waits."""

from __future__ import annotations

from common.section import Section, operational


class Retries(Section):
    """How long a stage tries a request, and waits for a lost server."""

    max_attempts: int = operational(default=6, gt=0, description="tries of one request")
    backoff_s: float = operational(default=1.0, ge=0, description="wait before the second try; doubles, jittered")
    request_timeout_s: float = operational(default=1800.0, gt=0, description="for one try")
    patience_s: float = operational(default=600.0, ge=0, description="how long to wait for a server to come back")

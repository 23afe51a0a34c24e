"""Fixtures of the synthesis's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import scripted


@pytest.fixture
def server() -> Iterator[scripted.Server]:
    with scripted.serve() as running:
        yield running

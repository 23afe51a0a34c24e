"""Fixtures of the tests of `bench watch`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from counting import Server, make_card, run_server

import bench.watch
from bench.card import Card


@pytest.fixture
def server() -> Iterator[Server]:
    with run_server() as running:
        yield running


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    found = make_card()
    monkeypatch.setattr(bench.watch, "read_card", lambda folder, filters: found)
    return found

"""Conversations to dump."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import write_conversations


@pytest.fixture(scope="session")
def conversations(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(target_folder, tmp_path_factory.mktemp("conversations"), 60)

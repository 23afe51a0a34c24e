"""The identity of a target, which conversations, stores and drafts record and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class TargetIdentity(Protocol):
    """The properties of `target.target.Target` that contracts read.

    `final_norm` is rms, gemma, layer or layer1p; checksums and the fingerprint are sha256 as hex.
    """

    @property
    def path(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def final_norm(self) -> str: ...

    @property
    def tokenizer_checksum(self) -> str: ...

    @property
    def template_checksum(self) -> str: ...

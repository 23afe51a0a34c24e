"""Where capture and training of a rolling store are, their rates, and which of them waits for the other."""

from __future__ import annotations

import time
from pathlib import Path

from common.files import read_json
from contracts.mooncake import Mooncake, MooncakeShelf
from contracts.rolling import CaptureState, Position, RollingStore, is_rolling
from contracts.shelf import Shelf

__all__ = ["WindowReader", "is_rolling"]

SIZE_EVERY_S = 60.0
"""A window holds many files: their sizes are summed once a minute."""


class WindowReader:
    """Describes a rolling store, again and again."""

    def __init__(self, folder: Path, mooncake: Mooncake | None = None) -> None:
        """`mooncake`: where the samples are, if not in the folder."""
        shelf: Shelf | None = None if mooncake is None else MooncakeShelf(mooncake, segment_bytes=0)
        self._store = RollingStore(folder, shelf)
        self._size: tuple[float, float] | None = None

    def describe(self) -> tuple[str, ...]:
        """Return lines of text. Raises UserError or ValueError for files that cannot be read."""
        store = self._store
        position, window = store.read_position() or Position(first_place=0, next_place=0), store.window
        states = [
            CaptureState.model_validate(read_json(path, "a capture's state"))
            for path in store.folder.glob("shards/*/capture.json")
        ]
        total = window.order["train.num_steps"] * window.order["train.global_batch_size"]
        size = f"{window.num_bytes / 2**30:.2f} GiB"
        filled = f"{size} of memory" if store.shelf.in_memory else f"{self._held():.2f} of {size}"
        captured = min((state.next_place for state in states), default=0)
        busy = sum(max(state.seconds - state.waited_s, 1e-3) for state in states)
        rate = len(states) * sum(state.tokens for state in states) / busy if states else 0.0
        idle = 1 - busy / max(sum(state.seconds for state in states), 1e-3) if states else 0.0
        waits = position.waited_s / max(position.seconds, 1e-3)
        return (
            f"window: {filled}; of {total} places, {position.first_place} are "
            f"behind the last checkpoint, {position.next_place} trained, {captured} captured",
            f"capture: {len(states)} processes, {rate:.0f} tokens/s at work; "
            f"{max(idle, 0.0):.0%} of the time they wait",
            f"train: {waits:.0%} of the time it waits for samples",
        )

    def _held(self) -> float:
        """Return the GiB of samples in the folder."""
        now = time.monotonic()
        if self._size is None or now - self._size[0] > SIZE_EVERY_S:
            total = 0
            for path in self._store.folder.rglob("*.safetensors"):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:  # trained on meanwhile
                    continue
            self._size = now, total / 2**30
        return self._size[1]

"""What a run's drafts reach: acceptance as `train eval` predicts it and `bench acceptance` serves it, and speeds.

Reads: eval*.json of the run's folder, acceptance.json of its benchmarks (docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.watched import JsonFile
from distributed.logs import number
from distributed.state import StageStatus

MAX_EVALUATIONS = 12
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Acceptance:
    """A predicted or served acceptance. `per_position`: of draft token 1, 2, ...; `interval`: of its length."""

    label: str
    is_served: bool
    length: float
    per_position: tuple[float, ...]
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Speed:
    """Tokens/s of a benchmark at a concurrency: without the draft, and by number of draft tokens."""

    label: str
    concurrency: str
    baseline: float
    drafted: dict[int, float]


class FigureReader:
    """Reads the figures again and again; a file only when it has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, JsonFile] = {}

    def read(self, stages: Sequence[StageStatus]) -> tuple[list[Acceptance], list[Speed], list[str]]:
        """Return acceptances, speeds, and warnings about files that cannot be read."""
        accepted, speeds, warnings = list[Acceptance](), list[Speed](), list[str]()
        for path, label, is_served in self._list_files(stages):
            name = path.name if path.parent == self._folder else f"{label}/{path.name}"
            try:
                value = self._read(path, name, warnings)
                if value is not None:
                    accepted += _served(label, value) if is_served else [_acceptance(label, False, value)]
                    speeds += _speeds(label, value) if is_served else []
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                warnings.append(f"{name}: not as this version writes it ({type(error).__name__}: {error})")
        return accepted, speeds, warnings

    def _list_files(self, stages: Sequence[StageStatus]) -> list[tuple[Path, str, bool]]:
        """Return the files, what their figures are called, and whether these were served."""
        evaluations = sorted(path for path in self._folder.glob("eval*.json") if path.is_file())[:MAX_EVALUATIONS]
        benches = [stage for stage in stages if stage.name == "bench acceptance"]
        reports = [(stage.folder / "acceptance.json", stage.label or stage.folder.name) for stage in benches]
        served = [(path, label, True) for path, label in reports if path.is_file()]
        return [*((path, path.stem, False) for path in evaluations), *served]

    def _read(self, path: Path, name: str, warnings: list[str]) -> dict[str, Any] | None:
        if path.stat().st_size > MAX_BYTES:
            warnings.append(f"{name}: larger than {MAX_BYTES >> 20} MiB, not read")
            return None
        file = self._files.setdefault(path, JsonFile(path))
        file.update()
        if file.problem:
            warnings.append(f"{name}: {file.problem}")
            return None
        # Steps of each sample, which may be many, are not needed again.
        for key in ("walks", "rows", "differing", "overruns"):
            file.value.pop(key, None)
        return file.value


def _acceptance(label: str, is_served: bool, value: dict[str, Any]) -> Acceptance:
    interval = value.get("interval")
    return Acceptance(
        label,
        is_served,
        number(value["acceptance_length"]),
        tuple(map(number, value["per_position"])),
        (number(interval[0]), number(interval[1])) if isinstance(interval, list) and len(interval) == 2 else None,
    )


def _served(label: str, value: dict[str, Any]) -> list[Acceptance]:
    """Return the acceptance of a benchmark: of conversations, or by K of prompt sets."""
    if "pooled" not in value:
        return [_acceptance(label, True, value)]
    return [_acceptance(f"{label}, K = {k}", True, found) for k, found in value["pooled"].items()]


def _speeds(label: str, value: dict[str, Any]) -> list[Speed]:
    by_tokens = {int(k): found["tokens_per_s"] for k, found in value.get("by_draft_tokens", {}).items()}
    return [
        Speed(label, str(at), number(base), {k: number(rates[at]) for k, rates in by_tokens.items() if at in rates})
        for at, base in value.get("baseline_tokens_per_s", {}).items()
    ]

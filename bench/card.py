"""Read a draft's card, and choose the rows of its figures that a server's acceptance is compared with.

Reads: certificate.json of an exported draft (contracts/certificate.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from contracts.certificate import CERTIFICATE_FILE, AcceptanceRow, find_digests, read_certificate


@dataclass(frozen=True)
class Filters:
    """Which rows of a card count: those of one set, thinking mode or temperature. None: all of them."""

    set: str | None = None
    thinking_mode: str | None = None
    temperature: float | None = None

    def keep(self, row: AcceptanceRow) -> bool:
        return (
            self.set in (None, row.set)
            and self.thinking_mode in (None, row.thinking_mode)
            and self.temperature in (None, row.temperature)
        )


@dataclass(frozen=True)
class Card:
    """A draft's figures. `source`: `served`, or `predicted` if its certificate has no served ones.

    `recipe`: the resolved recipe of the training, as the certificate has it.
    """

    name: str
    digest: str
    source: str
    rows: list[AcceptanceRow]
    recipe: dict[str, Any] = field(default_factory=dict)

    def rows_for(self, num_draft_tokens: int) -> list[AcceptanceRow]:
        """Return the rows of a number of draft tokens; without any, those of the next larger one, else of the largest.

        The positions that a row shares with the server are compared.
        """
        numbers = {row.num_draft_tokens for row in self.rows}
        larger = [number for number in numbers if number >= num_draft_tokens]
        chosen = min(larger) if larger else max(numbers)
        return [row for row in self.rows if row.num_draft_tokens == chosen]


def read_card(folder: Path, filters: Filters) -> Card:
    """Return a draft's card with the rows that the filters keep.

    Raises UserError for a folder without certificate, for a certificate that was changed, and without such rows.
    """
    certificate, values = read_certificate(folder)
    path = folder / CERTIFICATE_FILE
    if find_digests(values) != certificate.digests:
        raise UserError(
            path,
            found="figures that differ from their digests",
            expected="a certificate as `train export` wrote it",
            fix="See `train export --check`.",
        )
    served = [row for part in certificate.served for row in part.rows if row.steps]
    known = served or [row for part in certificate.predicted for row in part.rows if row.steps]
    if not known:
        raise UserError(
            path,
            found="no acceptance",
            expected="figures to compare with",
            fix="Export again with --served (of `bench acceptance`) or --eval (of `train eval`).",
        )
    rows = [row for row in known if filters.keep(row)]
    if not rows:
        raise UserError(
            path, found="no row of this set, thinking mode and temperature",
            expected=f"one of {'; '.join(sorted({describe_row(row) for row in known}))}",
            fix="Correct --card-set, --thinking-mode or --temperature.",
        )  # fmt: skip
    source = "served" if served else "predicted"
    return Card(certificate.name, certificate.digest, source, rows, certificate.recipe)


def describe_row(row: AcceptanceRow) -> str:
    """Return which requests a row is of."""
    temperature = "unknown" if row.temperature is None else f"{row.temperature:g}"
    return f"{row.set}, thinking {row.thinking_mode or 'unset'}, temperature {temperature}"

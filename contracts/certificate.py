"""The certificate of an exported draft, certificate.json: where it comes from, and every figure that is known of it.

Writes: FOLDER/certificate.json. README.md, the model card, is made from it alone (train/card.py).

`digests` has the sha256 of each other section (canonical JSON, as `hash_json`), and `digest` is the sha256 of
`digests`: a change is found, and named by its section. Whoever changes a figure and computes all digests anew is found
by comparing `digest` with the one that was published, or the figures with the reports that they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import hash_bytes, hash_json, read_json, write_json
from contracts.acceptance import Acceptance
from contracts.accuracy import Scores
from contracts.draft import CARD_FILE
from contracts.speeds import Speeds

CERTIFICATE_FILE = "certificate.json"
FORMAT_VERSION = 2
"""Also the version of the card's text: another text for the same certificate needs another number."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DraftFacts(Part):
    """The draft: as in its descriptor, `draftline.json`."""

    method: str
    layout: str
    dtype: str
    parameters: int
    hidden_size: int
    layer_ids: list[int]
    num_draft_tokens: int
    mask_token_id: int | None
    max_position_embeddings: int
    calibration: tuple[float, float] | None


class TargetFacts(Part):
    """The target. `repository` and `revision` (a commit) are known if it lies in the hub's cache."""

    name: str
    architecture: str
    repository: str | None
    revision: str | None
    fingerprint: str
    tokenizer: str
    template: str


class StoreFacts(Part):
    """The store of training states: checksum of its manifest, how it was captured, and the counts of its rows."""

    manifest: str
    engine: str
    engine_version: str
    quantization: str
    dtype: str
    layer_ids: list[int]
    counts: dict[str, int]
    environment: dict[str, str]


class SynthesisFacts(Part):
    """The generation of the training conversations: checksum of the prompts, sampling, and the counts of its rows."""

    prompts: str
    sampling: dict[str, Any]
    counts: dict[str, int]
    environment: dict[str, str]


class PromptSource(Part):
    """One source of the prompts: its rows, and how many of them were kept. `license`: None if none is stated."""

    name: str
    origin: str
    rows: int
    kept: int
    license: str | None


class PromptFacts(Part):
    """The prompts' manifest: its checksum, its sources, and the evaluation sets whose questions it keeps out."""

    manifest: str
    sources: list[PromptSource]
    evaluation_sets: list[str]


class DataFacts(Part):
    """The training data. `conversations` is the checksum of the records, `store` that of the store's ledger.

    The parts are None if `train export` was not given the folders.
    """

    conversations: str
    store: str
    samples: int
    held_out: int
    store_facts: StoreFacts | None = None
    synthesis: SynthesisFacts | None = None
    prompts: PromptFacts | None = None


class TrainingFacts(Part):
    """The training run and the checkpoint that was exported. `init_from`: what it started from, if anything.

    `trackers`: id and address of the run at each experiment tracker that others may reach.
    """

    checkpoint: str
    weights: str
    objective: str
    steps: int
    loss: float
    seconds: float
    init_from: dict[str, str]
    trackers: dict[str, dict[str, str]]
    environment: dict[str, str]


class AcceptanceRow(Part):
    """Acceptance on one set, thinking mode, temperature and number of draft tokens.

    `interval`: 95% of the acceptance length, over `n` resampled conversations (`train eval`: samples); None if the
    server reports no counts per request. `per_position`: share of steps that accepted at least i tokens.
    """

    set: str
    thinking_mode: str
    temperature: float | None
    num_draft_tokens: int
    acceptance_length: float
    interval: tuple[float, float] | None
    per_position: list[float]
    steps: int
    n: int


class Predicted(Part):
    """A report of `train eval`: its checksum, that of the store's ledger, and its rows.

    `trained_on`: how many of its samples the draft was trained on; None if that is not known.
    """

    set: str
    report: str
    store: str
    acceptance_length: float
    interval: tuple[float, float]
    confidence: dict[str, Any] | None
    trained_on: int | None = None
    rows: list[AcceptanceRow]


class Equality(Part):
    """Greedy replies with the draft against those without: how many are the same, and the largest gap of two logits.

    A reply that differs by a tie of two logits, or nearly, is rounding. `max_logit_gap` is None if none differs or no
    gap is known; `unknown` counts the differing replies of unknown gap.
    """

    what: str
    identical: int
    total: int
    max_logit_gap: float | None
    unknown: int


class SetOverlap(Part):
    """How many of an evaluation set's rows overlap with the training data."""

    rows: int
    overlapping: int


class PartOfOverlap(Part):
    """The acceptance length of `n` conversations, with its 95% interval."""

    n: int
    acceptance_length: float
    interval: tuple[float, float] | None


class Overlap(Part):
    """The overlap of what was measured with the training data, as `bench acceptance --training-conversations` finds it.

    `training`: checksums of what was searched. `acceptance`: by number of draft tokens, of `all`, `without_overlap` and
    `overlap_only`; None where it is not known.
    """

    training: list[str]
    sets: dict[str, SetOverlap]
    acceptance: dict[str, dict[str, PartOfOverlap | None]]


class Served(Part):
    """A folder of `bench acceptance`: checksum of acceptance.json, the server's settings and machine, its figures.

    `speeds` by concurrency, with the recommended number of draft tokens. `overlap`: None if it was not looked for.
    """

    sets: list[str]
    report: str
    settings: dict[str, Any]
    environment: dict[str, str]
    rows: list[AcceptanceRow]
    equality: list[Equality]
    overruns: int
    speeds: list[Speeds]
    overlap: Overlap | None


class Lossless(Part):
    """A folder of `bench lossless`: checksum of lossless.json, and what was checked."""

    report: str
    settings: dict[str, Any]
    environment: dict[str, str]
    replies: int
    identical: int
    ties: int
    tolerance: float
    concurrency: list[int]
    num_chats: int


class Accuracy(Part, Scores):
    """A folder of `bench accuracy`: checksum of accuracy.json, the servers' settings and machine, its comparisons."""

    report: str
    settings: dict[str, Any]
    environment: dict[str, str]


class Commands(Part):
    """Commands that serve the draft. `sglang` says why instead, if SGLang does not read this method or layout."""

    vllm: str
    sglang: str
    has_sglang: bool


class Certificate(Part):
    """The certificate. `files`: sha256 by name of all other files of the folder. Format 1 has no `accuracy`."""

    format_version: int = FORMAT_VERSION
    draft: DraftFacts
    target: TargetFacts
    data: DataFacts
    training: TrainingFacts
    recipe: dict[str, Any]
    predicted: list[Predicted]
    served: list[Served]
    lossless: list[Lossless]
    accuracy: list[Accuracy] = []
    commands: Commands
    environment: dict[str, str]
    files: dict[str, str]
    digests: dict[str, str] = {}
    digest: str = ""

    @property
    def name(self) -> str:
        """The draft's name on its card."""
        return f"{self.target.name}-{self.draft.method}"

    def with_rest_of(self, before: Certificate) -> Certificate:
        """Return the certificate with what it lacks of the figures and the data of an earlier one of this draft."""
        kinds = ("predicted", "served", "lossless", "accuracy")
        figures = {name: getattr(self, name) or getattr(before, name) for name in kinds}
        origins = ("store_facts", "synthesis", "prompts")
        data = {name: getattr(self.data, name) or getattr(before.data, name) for name in origins}
        return self.model_copy(update={**figures, "data": self.data.model_copy(update=data)})

    def sealed(self, card: str) -> Certificate:
        """Return the certificate with the checksum of its card's text and with its digests."""
        whole = self.model_copy(update={"files": {**self.files, CARD_FILE: hash_bytes(card.encode())}})
        digests = find_digests(whole.model_dump(mode="json"))
        return whole.model_copy(update={"digests": digests, "digest": hash_json(digests)})

    def write(self, folder: Path) -> None:
        write_json(folder / CERTIFICATE_FILE, self.model_dump(mode="json"))


def find_digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each section of a certificate's JSON."""
    return {key: hash_json(part) for key, part in values.items() if key not in ("digests", "digest")}


def read_certificate(folder: Path) -> tuple[Certificate, dict[str, Any]]:
    """Return a folder's certificate and its JSON as it is. Raises UserError if there is none, or it is no certificate.

    Nothing is compared: see train/check.py.
    """
    path = folder / CERTIFICATE_FILE
    values = read_json(path, "the certificate of a draft that `train export` wrote")
    try:
        return Certificate.model_validate(values), dict(values)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        place = ".".join(map(str, first["loc"])) if first else "the file"
        raise UserError(
            path,
            found=f"{place or 'the file'}: {first['msg'] if first else 'no JSON object'}",
            expected=f"a certificate of format {FORMAT_VERSION} or earlier",
            fix="Export the draft again, or get the folder again.",
        ) from None


def make_row(name: str, num_draft_tokens: int, values: Mapping[str, Any]) -> AcceptanceRow:
    """Return the row of a report's entry, which has `Acceptance.summary()`, a mode, a temperature and an interval."""
    counted = Acceptance(tuple(values["histogram"]))
    temperature = values["temperature"]
    return AcceptanceRow(
        set=name,
        thinking_mode=values["thinking_mode"],
        temperature=None if temperature is None else float(temperature),
        num_draft_tokens=num_draft_tokens,
        acceptance_length=round(counted.acceptance_length, 4),
        interval=values["interval"],
        per_position=[round(share, 4) for share in counted.per_position],
        steps=counted.steps,
        n=values["n"],
    )

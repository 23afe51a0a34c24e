"""Verify a draft's folder against its certificate, and the certificate against the reports and the data it cites.

Reads: FOLDER/certificate.json, every file of FOLDER; the reports, stores and manifests that are given.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.errors import IncompleteError, UserError
from common.files import hash_json
from contracts.certificate import CERTIFICATE_FILE, FORMAT_VERSION, Certificate, find_digests, read_certificate
from contracts.draft import CARD_FILE
from serve.command import fingerprint_files
from train.card import make_card
from train.certificate import WEIGHTS_FILE, Figures, hash_files
from train.provenance import describe_data

LOADED = (".json", ".safetensors", ".bin", ".pt", ".py", ".jinja", ".model")
"""Endings of files that a server may load; others, such as a license, may be added to a folder."""


def check_folder(folder: Path, figures: Figures | None = None) -> Certificate:
    """Return the certificate of a folder in which nothing was changed. `figures`: reports and data to compare it with.

    Raises UserError if the folder has no certificate, IncompleteError after printing every difference.
    """
    certificate, values = read_certificate(folder)
    found = list(_differences(folder, certificate, values))
    if not found and figures is not None:
        found = list(_other_sources(folder, certificate, figures))
    for line in found:
        print(f"check: {line}")
    if found:
        raise IncompleteError(
            f"{folder}: found {len(found)} difference{'s' if found[1:] else ''} from its certificate, expected none. "
            f"First: {found[0]}. Get the "
            "folder again, or export the draft again."
        )
    for name in sorted(_files_besides(folder, certificate)):
        print(f"check: note: {name} is not in the certificate")
    print(f"check: {folder}: {len(certificate.files) + 1} files are those of certificate {certificate.digest}")
    return certificate


def _differences(folder: Path, certificate: Certificate, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each difference between the folder, its certificate and the certificate's own digests."""
    for section, digest in find_digests(values).items():
        if certificate.digests.get(section) != digest:
            yield f"{CERTIFICATE_FILE}: section {section} was changed"
    if hash_json(certificate.digests) != certificate.digest:
        yield f"{CERTIFICATE_FILE}: its digests were changed"
    written = json.dumps(values, indent=1, ensure_ascii=False) + "\n"  # as write_json does
    if (folder / CERTIFICATE_FILE).read_bytes() != written.encode():
        yield f"{CERTIFICATE_FILE}: its bytes are not those that `train export` writes"
    found = hash_files(folder)
    for name, checksum in certificate.files.items():
        if name not in found:
            yield f"{name}: no such file"
        elif found[name] != checksum:
            yield f"{name}: sha256 {found[name]}, certified {checksum}"
    if certificate.format_version == FORMAT_VERSION and CARD_FILE in found:
        yield from _compare_card(folder / CARD_FILE, make_card(certificate))
    for name in sorted(_files_besides(folder, certificate)):
        if name.endswith(LOADED):
            yield f"{name}: not in the certificate, and a server may load it"


def _files_besides(folder: Path, certificate: Certificate) -> set[str]:
    return set(hash_files(folder)) - set(certificate.files)


def _compare_card(path: Path, expected: str) -> Iterator[str]:
    """Yield the first line of the card that does not say what the certificate says."""
    card = path.read_bytes().decode(errors="replace")
    if card == expected:
        return
    ours, theirs = expected.splitlines(keepends=True), card.splitlines(keepends=True)
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    _, first, last, start, end = next(block for block in blocks if block[0] != "equal")
    say = [("".join(lines).strip() or "nothing")[:160] for lines in (theirs[start:end], ours[first:last])]
    yield f"{path.name}, line {start + 1}: says {say[0]!r}, the certificate {say[1]!r}"


def _other_sources(folder: Path, certificate: Certificate, figures: Figures) -> Iterator[str]:
    """Yield a line for each section that the given reports and data do not confirm."""
    weights = (certificate.training.weights, certificate.files[WEIGHTS_FILE])
    try:
        found = figures.read(weights, fingerprint_files(folder), certificate.target.fingerprint)
        for section, parts in found.items():
            certified = {part.report: part for part in getattr(certificate, section)}
            for part in parts:
                if part.report not in certified:
                    yield f"{section}: the report with sha256 {part.report} is not one that it cites"
                elif name := _find_difference(certified[part.report], part):
                    yield f"{section}: {name}"
        if figures.data.store is not None:
            yield from _compare_data(certificate, figures)
    except UserError as error:
        yield str(error)


def _compare_data(certificate: Certificate, figures: Figures) -> Iterator[str]:
    """Yield a line for each fact of the training data that differs. What the certificate lacks is not compared."""
    data = certificate.data
    run = {"summary": {"samples": data.samples, "held_out": data.held_out}, "inputs": {"store": data.store}}
    found = describe_data(run, data.conversations, figures.data)
    for name in ("store_facts", "synthesis", "prompts"):
        ours, theirs = getattr(data, name), getattr(found, name)
        if ours is not None and theirs is not None and (difference := _find_difference(ours, theirs)):
            yield f"data.{name}: {difference}"


def _find_difference(certified: BaseModel, found: BaseModel) -> str:
    """Return the first field that differs, "" if none; names of sets do not count, which the user chooses."""
    names: Any = {"set": True, "sets": True, "rows": {"__all__": {"set"}}}
    before, now = certified.model_dump(mode="json", exclude=names), found.model_dump(mode="json", exclude=names)
    return _locate(before, now) if before != now else ""


def _locate(certified: Any, found: Any, place: str = "") -> str:
    """Return the first of the values that differ in two that do, and where it is: rows.0.acceptance_length."""
    parts: list[tuple[Any, Any, Any]] = []
    if isinstance(certified, dict) and isinstance(found, dict) and certified.keys() == found.keys():
        parts = [(name, value, found[name]) for name, value in certified.items()]
    elif isinstance(certified, list) and isinstance(found, list) and len(certified) == len(found):
        parts = [(number, *pair) for number, pair in enumerate(zip(certified, found, strict=True))]
    for name, ours, theirs in parts:
        if ours != theirs:
            return _locate(ours, theirs, f"{place}.{name}" if place else str(name))
    return f"{place}: found {str(found)[:160]}, certified {str(certified)[:160]}"

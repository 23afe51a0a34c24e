"""Claims about what synthesis filters: media, the mask token and rows that no token has, each with its count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scripted
from conftest import read_lines, run_here

from synth.tokens import TokenCheck, UnusableTokensError
from target.mask_token import Tokens
from target.section import TargetSection
from target.target import Target

RESERVED = "<|reserved_0|>"


@pytest.fixture
def reserving_target(target_folder: Path, tmp_path: Path) -> Target:
    """The tiny target with one more token, a reserved one, in its first free row."""
    folder = tmp_path / "reserving"
    folder.mkdir()
    for path in target_folder.iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = max(Tokens.of(Target.read(folder)).ids) + 1
    tokenizer["added_tokens"].append({"id": first, "content": RESERVED, "special": True})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Target.read(folder)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_filtered_rows_are_counted_by_reason_and_the_others_are_kept(
    recipe_path: Path, reserving_target: Target, tmp_path: Path
) -> None:
    mask = max(Tokens.of(reserving_target).ids)
    image = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    rows: list[dict[str, Any]] = [
        {"prompt": "hello"},
        {"turns": ["one", f"token {mask}"]},
        {"prompt": f"token {mask}"},
        {"prompt": f"token {mask + 1}"},
        {"messages": [{"role": "user", "content": image}]},
        {"prompt": "token 7"},
    ]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    args = ["synth", "generate", "-r", recipe_path, "--set", f"target.path={reserving_target.path}"]
    args += ["--set", f"target.mask_token_id={mask}", "--prompts", prompts, "--output", tmp_path / "out"]
    with scripted.serve() as server:
        args += ["--endpoint", server.url]
        printed = run_here(*args).stdout
        sent = [str(request["messages"]) for request in server.requests]
    assert not any("What is it?" in text for text in sent)
    assert "6 rows: 2 done, 4 filtered" in printed
    held = f"a reply contains the mask token {mask}, which must never occur"
    unknown = f"the target generated {mask + 1}, a row that no token of the tokenizer has"
    media = "a user message with image content: drafts are trained on text alone"
    told = next(line for line in printed.splitlines() if line.startswith("synth: filtered: "))
    assert set(told.removeprefix("synth: filtered: ").split("; ")) == {f"2 x {held}", f"1 x {unknown}", f"1 x {media}"}
    ledger = {line["index"]: (line["status"], line.get("reason")) for line in read_lines(tmp_path / "out/ledger.jsonl")}
    assert ledger == {
        0: ("done", None), 1: ("filtered", held), 2: ("filtered", held), 3: ("filtered", unknown),
        4: ("filtered", media), 5: ("done", None),
    }  # fmt: skip
    assert len(read_lines(tmp_path / "out/rejects.jsonl")) == 4
    result = run_here(*args, "--set", f"target.mask_token_id={mask + 1}", check=False)
    assert result.returncode == 2
    assert f"(settings.target.mask_token_id): found None, expected {mask}" in result.stderr


def test_a_prompt_that_contains_the_mask_token_is_refused(reserving_target: Target) -> None:
    mask = max(Tokens.of(reserving_target).ids)
    check = TokenCheck.of(TargetSection(path=reserving_target.path, mask_token_id=mask), reserving_target)
    check.refuse([1, 2], [3, 4])
    with pytest.raises(UnusableTokensError, match=f"a prompt contains the mask token {mask}"):
        check.refuse([1, mask], [3, 4])


def test_a_free_row_as_mask_token_does_not_bind_a_resume_and_is_still_filtered(target_folder: Path) -> None:
    target = Target.read(target_folder)
    check = TokenCheck.of(TargetSection(path=target_folder), target)
    assert check.settings() == {}
    with pytest.raises(UnusableTokensError, match="a row that no token of the tokenizer has"):
        check.refuse([1, 2], [3, max(Tokens.of(target).ids) + 1])


def test_a_target_without_tokenizer_json_is_generated_from_without_the_check(
    target_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").symlink_to(target_folder / "config.json")
    check = TokenCheck.of(TargetSection(path=tmp_path), Target.read(tmp_path))
    check.refuse([1], [10**6])

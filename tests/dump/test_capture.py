"""Claims about the capture: an engine's answer that is not what was asked for is rejected with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from contracts.conversation import Conversation, Loop, Sample
from dump.capture import Captured, CaptureError, Staged, Staging, load_staged
from dump.rendered import TemplateMasks
from dump.samples import Filter, Row, read_rows
from dump.writer import make_stored
from recipe.load import load_recipe
from target.target import Target

HIDDEN, IDS = 4, [7, 8, 9]
LOOP = Loop(turn=0, period=2, num_tokens=200)


def collect(path: Path, states: torch.Tensor, ids: list[int]) -> Captured:
    """What is made of a file of the connector's that holds these states."""
    save_file({"hidden_states": states, "token_ids": torch.tensor(ids)}, path)
    path.with_name(f"{path.name}.lock").touch()
    return load_staged(Staged("a", path), IDS, num_layers=2, hidden_size=HIDDEN)


def test_layers_and_final_state_are_told_apart(tmp_path: Path) -> None:
    states = torch.randn(3, 3, HIDDEN)
    captured = collect(tmp_path / "f", states, IDS)
    assert torch.equal(captured.layers, states[:, :2])
    assert torch.equal(captured.final, states[:, 2])


@pytest.mark.parametrize(
    ("states", "ids", "reason"),
    [
        (torch.zeros(2, 3, HIDDEN), IDS, "2 of 3 tokens"),
        (torch.zeros(3, 2, HIDDEN), IDS, "shape"),
        (torch.zeros(3, 3, HIDDEN), [7, 8, 8], "other token ids"),
        (torch.full((3, 3, HIDDEN), float("nan")), IDS, "not finite"),
    ],
)
def test_a_wrong_answer_is_rejected_with_its_reason(
    tmp_path: Path, states: torch.Tensor, ids: list[int], reason: str
) -> None:
    with pytest.raises(CaptureError, match=reason):
        collect(tmp_path / "f", states, ids)


def test_a_file_that_was_never_written_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="cannot be read"):
        load_staged(Staged("a", tmp_path / "none"), IDS, 2, HIDDEN)
    with pytest.raises(CaptureError, match="named no file"):
        load_staged(Staged("a", None), IDS, 2, HIDDEN)
    with pytest.raises(CaptureError, match="the server did not answer"):
        load_staged(Staged("a", None, "the server did not answer"), IDS, 2, HIDDEN)


def test_a_staged_file_is_gone_once_it_was_read_whatever_it_held(tmp_path: Path) -> None:
    collect(tmp_path / "good", torch.zeros(3, 3, HIDDEN), IDS)
    with pytest.raises(CaptureError):
        collect(tmp_path / "bad", torch.zeros(3, 3, HIDDEN), [1])
    assert list(tmp_path.iterdir()) == []


def test_staging_holds_so_many_bytes_and_a_larger_sample_alone(tmp_path: Path) -> None:
    staging = Staging(tmp_path, 100)
    assert staging.take(60)
    assert not staging.take(60)
    staging.give(60)
    assert staging.take(1000)
    assert not staging.take(1)


def make_conversation(**changes: Any) -> Conversation:
    values = {
        "id": "0" * 32, "source_id": "s", "index": 0, "messages": [], "finish_reason": "stop", "sampling": {},
        "samples": [Sample(token_ids=[1, 2, 3, 4], loss_spans=[(2, 4)])], "target": {}, "template": "", "usage": {},
        **changes,
    }  # fmt: skip
    return Conversation(**values)


@pytest.mark.parametrize(
    ("changes", "max_tokens", "overrides", "mask_token", "status"),
    [
        ({}, 4, [], None, None),
        ({}, 3, [], None, "filtered"),
        ({}, 3, ["dump.truncate=true"], None, None),
        ({}, 2, ["dump.truncate=true"], None, "filtered"),
        ({"finish_reason": "length"}, 4, [], None, "truncated"),
        ({"finish_reason": "length"}, 4, ["dump.include_truncated=true"], None, None),
        ({"loop": LOOP}, 4, [], None, "filtered"),
        ({"loop": LOOP}, 4, ["dump.include_loops=true"], None, None),
        ({"samples": [Sample(token_ids=[1, 2], loss_spans=[])]}, 4, [], None, "filtered"),
        ({}, 4, [], 4, "filtered"),
        ({}, 4, [], 5, None),
        ({}, 3, ["dump.truncate=true"], 4, None),  # the token was cut off
    ],
)
def test_a_sample_is_taken_or_left_out_with_a_reason(
    recipe_path: Path,
    changes: dict[str, Any],
    max_tokens: int,
    overrides: list[str],
    mask_token: int | None,
    status: str | None,
) -> None:
    conversation = make_conversation(**changes)
    row = Row("a-0", conversation, conversation.samples[0])
    verdict = Filter(load_recipe(recipe_path, overrides).dump, max_tokens, mask_token).judge(row)
    assert (verdict.row is None) == (status is not None)
    assert verdict.status == (status or "")
    if verdict.row is not None:
        assert verdict.row.num_tokens == min(4, max_tokens)
        assert verdict.row.sample.loss_spans == [(2, min(4, max_tokens))]


def test_shards_hold_every_sample_once_whatever_the_order(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path)
    masks = TemplateMasks(recipe.target, Target.read(recipe.target.path))
    ids = [f"{number * 7919:032x}" for number in range(40)]
    for name, order in (("a", ids), ("b", ids[::-1])):
        lines = [make_conversation(id=id_).model_dump_json() for id_ in order]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    for number in range(3):
        parts = [{row.sample_id for row in read_rows([tmp_path / name], masks, (number, 3))} for name in "ab"]
        assert parts[0] == parts[1]
    whole = [row.sample_id for number in range(3) for row in read_rows([tmp_path / "a"], masks, (number, 3))]
    assert sorted(whole) == sorted(f"{id_}-0" for id_ in ids)


def test_the_mask_covers_the_loss_spans_and_nothing_else() -> None:
    conversation = make_conversation(samples=[Sample(token_ids=[1, 2, 3, 4, 5], loss_spans=[(1, 2), (3, 5)])])
    row = Row(f"{conversation.id}-0", conversation, conversation.samples[0])
    stored = make_stored(row, Captured(torch.zeros(5, 2, HIDDEN), torch.zeros(5, HIDDEN)))
    assert stored.loss_mask.tolist() == [False, True, False, True, True]
    assert stored.aux_hidden_states.shape == (5, 2 * HIDDEN)

"""Claims about the capture: an engine's answer that is not what was asked for is rejected with its reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from contracts.conversation import Conversation, Loop, Sample
from contracts.ledger import Ledger
from contracts.recipe import load_recipe
from dump.engine import CaptureEngine, CaptureError
from dump.run import _accept, make_stored

HIDDEN, IDS = 4, [7, 8, 9]
LOOP = Loop(turn=0, period=2, num_tokens=200)


def make_engine() -> CaptureEngine:
    """A capture engine whose vLLM is left out: only what comes back from it is at stake here."""
    engine = CaptureEngine.__new__(CaptureEngine)
    engine._layer_ids = [1, 3]
    engine._hidden_size = HIDDEN
    engine._connector = SimpleNamespace(load_hidden_states=load_file, cleanup_hidden_states=lambda path: None)
    return engine


def collect(path: Path, states: torch.Tensor, ids: list[int]) -> Any:
    save_file({"hidden_states": states, "token_ids": torch.tensor(ids)}, path)
    return make_engine()._collect(SimpleNamespace(kv_transfer_params={"hidden_states_path": str(path)}), IDS)


def test_layers_and_final_state_are_told_apart(tmp_path: Path) -> None:
    states = torch.randn(3, 3, HIDDEN)
    captured = collect(tmp_path / "f", states, IDS)
    assert torch.equal(captured.layers, states[:, :2])
    assert torch.equal(captured.final, states[:, 2])


@pytest.mark.parametrize(
    ("states", "ids", "reason"),
    [
        (torch.zeros(2, 3, HIDDEN), IDS, "shape"),
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
    missing = SimpleNamespace(kv_transfer_params={"hidden_states_path": str(tmp_path / "none")})
    with pytest.raises(CaptureError, match="cannot be read"):
        make_engine()._collect(missing, IDS)
    with pytest.raises(CaptureError, match="named no file"):
        make_engine()._collect(SimpleNamespace(kv_transfer_params=None), IDS)


def make_conversation(**changes: Any) -> Conversation:
    values = {
        "id": "0" * 32, "source_id": "s", "index": 0, "messages": [], "finish_reason": "stop", "sampling": {},
        "samples": [Sample(token_ids=[1, 2, 3, 4], loss_spans=[(2, 4)])], "target": {}, "template": "", "usage": {},
        **changes,
    }  # fmt: skip
    return Conversation(**values)


@pytest.mark.parametrize(
    ("changes", "max_tokens", "overrides", "status"),
    [
        ({}, 4, [], None),
        ({}, 3, [], "filtered"),
        ({"finish_reason": "length"}, 4, [], "truncated"),
        ({"finish_reason": "length"}, 4, ["dump.include_truncated=true"], None),
        ({"loop": LOOP}, 4, [], "filtered"),
        ({"loop": LOOP}, 4, ["dump.include_loops=true"], None),
        ({"samples": [Sample(token_ids=[1, 2], loss_spans=[])]}, 4, [], "filtered"),
    ],
)
def test_a_sample_is_taken_or_accounted_for(
    tmp_path: Path,
    recipe_path: Path,
    changes: dict[str, Any],
    max_tokens: int,
    overrides: list[str],
    status: str | None,
) -> None:
    conversation = make_conversation(**changes)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    row = ("a", conversation, conversation.samples[0])
    assert _accept(load_recipe(recipe_path, overrides), ledger, row, max_tokens) == (status is None)
    assert ledger.entries.get("a", {}).get("status") == status


def test_the_mask_covers_the_loss_spans_and_nothing_else() -> None:
    conversation = make_conversation(samples=[Sample(token_ids=[1, 2, 3, 4, 5], loss_spans=[(1, 2), (3, 5)])])
    stored = make_stored(conversation, conversation.samples[0], torch.zeros(5, 2, HIDDEN), torch.zeros(5, HIDDEN))
    assert stored.loss_mask.tolist() == [False, True, False, True, True]
    assert stored.aux_hidden_states.shape == (5, 2 * HIDDEN)

"""The claim of the draft protocol: a method that is one folder's worth of code goes through every stage.

The method below is defined here and nowhere else: Medusa-like heads, each of which predicts one token from the captured
features before the anchor and the anchor's embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import run_here
from pydantic import Field
from torch import nn
from torch.nn import functional
from written import write_store

from bench.explain import explain_config
from common.errors import UserError
from contracts.draft import Descriptor, DraftConfig, DraftRun
from contracts.store import Store, StoredSample
from drafts import METHODS
from drafts.batch import Batch
from drafts.draft import Draft, Drafted, Plan
from drafts.method import DraftMethod, DraftSection, ExportFacts
from drafts.objective import StepLoss, fused_loss
from drafts.places import anchor_places
from recipe.load import load_recipe
from serve.command import fingerprint_draft, speculation_of
from target.head import TargetHead
from target.target import Target


class HeadsSection(DraftSection):
    method: Literal["heads"] = "heads"
    num_heads: int = Field(default=3, gt=0)

    @property
    def num_draft_tokens(self) -> int:
        return self.num_heads


class HeadsConfig(DraftConfig):
    method: Literal["heads"] = "heads"
    num_heads: int

    @property
    def num_draft_tokens(self) -> int:
        return self.num_heads


@dataclass
class Places(Plan):
    rows: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    @property
    def num_slots(self) -> int:
        return int(self.valid.sum())


class Heads(Draft):
    def __init__(
        self, config: HeadsConfig, section: HeadsSection | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config: HeadsConfig = config
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        self.heads = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(config.num_heads))

    def plan(self, batch: Batch) -> Places:
        rows = anchor_places(batch.loss_mask)
        rows = rows[rows > 0]
        wanted = rows[:, None] + torch.arange(1, self.config.num_heads + 1)
        inside = wanted < len(batch.token_ids)
        wanted = wanted.clamp(max=len(batch.token_ids) - 1)
        return Places(rows, batch.token_ids[wanted], (batch.loss_mask[wanted] & inside).long().cumprod(1).bool())

    def hidden(self, ids: torch.Tensor, aux: torch.Tensor, rows: torch.Tensor, head: TargetHead) -> torch.Tensor:
        x = self.fc(aux[rows - 1]) + functional.embedding(ids[rows], head.embedding)
        return torch.stack([x + functional.silu(layer(x)) for layer in self.heads], dim=1)

    def forward(self, batch: Batch, plan: Places, head: TargetHead) -> StepLoss:
        hidden, valid = self.hidden(batch.token_ids, batch.aux_hidden_states, plan.rows, head), plan.valid
        weights = torch.ones(plan.num_slots)
        found = fused_loss(hidden[valid], head.lm_head, plan.labels[valid], weights)
        return StepLoss.of_blocks(found.total, found.hits, valid.view(-1).nonzero()[:, 0], valid)

    def logits(self, sample: StoredSample, head: TargetHead, rows: torch.Tensor) -> torch.Tensor:
        ids, aux = sample.input_ids.long(), sample.aux_hidden_states.float()
        return functional.linear(self.hidden(ids, aux, rows, head), head.lm_head)

    def plan_drafting(self, token_ids: torch.Tensor, loss_mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return places

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: torch.Tensor, head: TargetHead
    ) -> Drafted:
        hidden = self.hidden(token_ids, aux_hidden_states.float(), plan, head)
        return Drafted(functional.linear(hidden, head.lm_head).argmax(-1))

    def score_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: torch.Tensor, head: TargetHead, t: float
    ) -> torch.Tensor:
        hidden = self.hidden(token_ids, aux_hidden_states.float(), plan, head)
        wanted = (plan[:, None] + torch.arange(1, hidden.shape[1] + 1)).clamp(max=len(token_ids) - 1)
        return (
            functional.linear(hidden, head.lm_head).div(t).softmax(-1).gather(2, token_ids[wanted][..., None])[..., 0]
        )

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        return {"draft_logits": self.logits(sample, head, torch.tensor([start]))[0]}


class HeadsMethod(DraftMethod):
    name = "heads"
    section = HeadsSection
    config = HeadsConfig

    def module(self) -> type[Heads]:
        return Heads

    def export(
        self, config: DraftConfig, weights: Mapping[str, torch.Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        own = {"architectures": ["HeadsModel"], "dtype": facts.dtype, **config.model_dump(mode="json")}
        return own, dict(weights)

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        if config.get("architectures") != ["HeadsModel"]:
            return None
        return self.describe_trained(HeadsConfig.model_validate({k: config[k] for k in HeadsConfig.model_fields}))

    def speculative_config(self, config: DraftConfig) -> dict[str, Any]:
        return {"method": "medusa", "draft_tensor_parallel_size": 1}


@pytest.fixture
def args(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setitem(METHODS, "heads", HeadsMethod())
    sets = ("train.draft.method=heads", "train.draft.num_heads=2", "train.num_steps=60", "train.learning_rate=0.01")
    return ["--recipe", recipe_path, *(word for one in sets for word in ("--set", one))]


def test_a_method_defined_outside_the_project_goes_through_all_stages(
    args: list[object], recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    target = Target.read(target_folder)
    store, draft, export = write_store(tmp_path / "store", target), tmp_path / "draft", tmp_path / "export"
    run_here("recipe", "check", *args)
    assert "num_heads: 2  # --set" in run_here("recipe", "show", *args).stdout

    run_here("train", "offline", *args, "--store", store, "--output", draft)
    losses = [json.loads(line)["loss"] for line in (draft / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    report = tmp_path / "eval.json"
    run_here("train", "eval", *args, "--run", draft, "--store", store, "--output", report)
    evaluation = json.loads(report.read_text())
    assert evaluation["num_draft_tokens"] == 2
    assert evaluation["acceptance_length"] > 1.3
    run_here("train", "trace", *args, "--run", draft, "--store", store, "--output", tmp_path / "trace.safetensors")
    run_here("train", "export", *args, "--run", draft, "--output", export, "--eval", report)
    assert "A heads draft" in (export / "README.md").read_text()

    command = run_here("serve", "command", *args, "--draft", export).stdout
    for told in ('"method": "medusa"', '"draft_tensor_parallel_size": 1', '"num_speculative_tokens": 2'):
        assert told in command
    recipe = load_recipe(recipe_path)
    assert speculation_of(recipe, target, export)["num_speculative_tokens"] == 2
    assert len(fingerprint_draft(recipe, export)) == 64
    assert explain_config(export, DraftRun(draft), Store(store)) == ""
    (export / "draftline.json").unlink()  # then as a published draft, described by its config.json
    assert speculation_of(recipe, target, export)["method"] == "medusa"
    again = tmp_path / "again.json"
    run_here("train", "eval", *args, "--draft", export, "--store", store, "--output", again)
    assert {**json.loads(again.read_text()), "inputs": evaluation["inputs"]} == evaluation
    warm = ["--set", f"train.init_from={export}", "--set", "train.num_steps=1", "--output", tmp_path / "warm"]
    printed = run_here("train", "offline", *args, *warm, "--store", store).stdout
    assert f"acceptance length {evaluation['acceptance_length']:.3f}" in printed
    assert "the draft has" not in printed


def test_the_union_of_sections_knows_the_new_method_and_its_keys(args: list[object], recipe_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'num_hads'.*Did you mean 'num_heads'"):
        load_recipe(recipe_path, ["train.draft.method=heads", "train.draft.num_hads=2"])
    known = "dflash, dflash2, dspark, eagle3, lilicorr, peagle, heads"
    with pytest.raises(UserError, match=f"known methods: {known}"):
        load_recipe(recipe_path, ["train.draft.method=tails"])

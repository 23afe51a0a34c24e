"""Claims about the export: what vLLM computes with it is what the trainer computes, with and without YaRN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from warm import Warm
from written import write_store

from contracts.draft import DraftRun
from contracts.store import StoredSample
from drafts import METHODS
from drafts.dflash.model import DFlash
from drafts.draft import Draft
from drafts.eagle3.model import Eagle3
from drafts.published import read_config
from target.head import read_head
from target.target import Target

PROMPT = 150  # beyond the YaRN draft's original window of 128


def serve(engine: Warm, method: str, target_folder: Path, folder: Path) -> dict[str, Any]:
    """What the probe found of the export in `folder`."""
    probe = Path(__file__).with_name("logits_probe.py")
    engine.run(probe, method, target_folder, folder / "export", PROMPT, folder / "served.pt")
    return dict(torch.load(folder / "served.pt", weights_only=True))


def build_draft(run: DraftRun) -> Draft:
    config = read_config(run)
    return METHODS[config.method].build(config)


@pytest.mark.vllm
@pytest.mark.proves("EAGLE3 logits")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("yarn", "known", "layout"), [(True, None, "native"), (False, None, "speculators"), (False, 300, "native")]
)
def test_logits_of_an_exported_eagle3_draft_are_the_trainers(
    engine: Warm, recipe_path: Path, target_folder: Path, tmp_path: Path, yarn: bool, known: int | None, layout: str
) -> None:
    args = ["--recipe", recipe_path, "--set", "train.draft.method=eagle3", "--set", "train.draft.ttt_length=3"]
    args += ["--set", f"train.draft.draft_vocab_size={known}"] if known else []
    args += [] if yarn else ["--set", "export.yarn=null"]
    store = write_store(tmp_path / "store", Target.read(target_folder))
    printed = run_here("train", "offline", *args, "--store", store, "--output", tmp_path / "draft").stdout
    assert bool(known) == ("the draft knows 300 of" in printed)
    draft_run = DraftRun(tmp_path / "draft")
    draft = build_draft(draft_run)
    weights = load_file(draft_run.chosen_weights())
    weights = {name: 4 * tensor if tensor.dim() > 1 else tensor for name, tensor in weights.items()}
    save_file(weights, draft_run.chosen_weights())
    draft.load_state_dict(weights)
    places = ("--run", tmp_path / "draft", "--output", tmp_path / "export")
    run_here("train", "export", *args, "--format", layout, *places)
    served = serve(engine, "eagle3", target_folder, tmp_path)

    target = Target.read(target_folder)
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    token_ids = torch.tensor([*range(10, 10 + PROMPT), *served["token_ids"]])
    with torch.no_grad():
        states = model(token_ids[None], output_hidden_states=True).hidden_states
    aux = torch.cat([states[i + 1][0] for i in draft.config.layer_ids], dim=-1)
    mask = torch.arange(len(token_ids)) >= PROMPT
    sample = StoredSample(token_ids, mask, torch.zeros(len(token_ids), target.hidden_size), aux, {})
    assert isinstance(draft, Eagle3)
    ours = draft.draft_logits(sample, read_head(target), torch.tensor([PROMPT]))[1][0]
    for step in range(3):  # the chain from the first token of the reply
        assert ours[step].abs().max() > 1
        tolerance = 1e-4 * float(ours[step].abs().max())
        found = served["logits"][step][0]
        if known:
            assert torch.equal(found.isfinite(), draft.t2d)
            found = found[draft.t2d]
        torch.testing.assert_close(found, ours[step], rtol=0, atol=tolerance)


@pytest.mark.vllm
@pytest.mark.proves("DFlash logits")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("yarn", "layout"), [(True, "native"), (False, "speculators")])
def test_logits_of_an_exported_dflash_draft_are_the_trainers(
    engine: Warm, recipe_path: Path, target_folder: Path, tmp_path: Path, yarn: bool, layout: str
) -> None:
    args = ["--recipe", recipe_path, *([] if yarn else ["--set", "export.yarn=null"])]
    store = write_store(tmp_path / "store", Target.read(target_folder))
    run_here("train", "offline", *args, "--store", store, "--output", tmp_path / "draft")
    draft_run = DraftRun(tmp_path / "draft")
    draft = build_draft(draft_run)
    assert isinstance(draft, DFlash)
    weights = load_file(draft_run.chosen_weights())
    # Larger than training leaves them, so that no two logits are near.
    weights = {name: 4 * tensor if tensor.dim() > 1 else tensor for name, tensor in weights.items()}
    save_file(weights, draft_run.chosen_weights())
    draft.load_state_dict(weights)
    places = ("--run", tmp_path / "draft", "--output", tmp_path / "export")
    run_here("train", "export", *args, "--format", layout, *places)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert bool({**config, **config.get("transformer_layer_config", {})}["rope_scaling"]) == yarn

    served = serve(engine, "dflash", target_folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    token_ids = torch.tensor([*range(10, 10 + PROMPT), *served["token_ids"]])
    with torch.no_grad():
        states = model(token_ids[None], output_hidden_states=True).hidden_states
        aux = torch.cat([states[i + 1][0] for i in draft.config.layer_ids], dim=-1)
        place = PROMPT  # the prefill gave the first token of the reply; a random draft is hardly ever accepted
        for logits in served["logits"][:2]:
            blocks = draft.lay_out(
                token_ids, torch.ones(len(token_ids), dtype=torch.bool), [len(token_ids)], [torch.tensor([place])]
            )
            hidden = draft.hidden(token_ids, aux, blocks, model.model.embed_tokens.weight)
            ours = torch.nn.functional.linear(hidden[0], model.lm_head.weight)
            assert ours.abs().max() > 1
            torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
            accepted = 0
            while int(ours[accepted].argmax()) == int(token_ids[place + 1 + accepted]):
                accepted += 1
            place += accepted + 1

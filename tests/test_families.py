"""Claims about the model families of docs/families.md: each goes through all stages, and vLLM computes the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import RECIPE_TEXT, ROOT, run, run_here
from families import FAMILIES, Family, build_family
from safetensors.torch import load_file, save_file
from warm import Warm
from written import write_conversations

from contracts.draft import DraftRun
from contracts.store import Store
from contracts.trace import read_traces
from dump.hf import load_model
from dump.reference import TOLERANCE, distance
from target.head import read_head
from target.target import Target

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

METHODS = ("dflash", "eagle3")
IN_VLLM = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]
QUICK = ("gemma4", "gpt_oss")
"""Families whose tests with vLLM are not long ones: scaled embeddings, a cap, sinks, windows, experts."""
RARE = ("glm4", "glm4_moe")
"""Families whose norms and experts other families have, too."""


@dataclass(frozen=True)
class Made:
    """A family's folder with a target, conversations, and the store that transformers filled."""

    name: str
    folder: Path

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def target(self) -> Target:
        return Target.read(self.folder / "target")

    def args(self, *settings: str) -> list[object]:
        words = [word for value in (*self.family.settings, *settings) for word in ("--set", value)]
        return ["--recipe", self.folder / "recipe.yaml", *words]

    def train(self, method: str) -> tuple[list[object], Path]:
        """The flags and the folder of a run of three steps, with its evaluation and its export; made once."""
        args = self.args(f"train.draft.method={method}", "train.num_steps=3")
        places, folder = ["--store", self.folder / "store"], self.folder / method
        if not folder.exists():
            run_here("train", "offline", *args, *places, "--output", folder)
            run_here("train", "eval", *args, "--run", folder, *places, "--output", folder / "eval.json")
            more = ["--output", folder / "export", "--eval", folder / "eval.json"]
            run_here("train", "export", *args, "--run", folder, *more)
        return args, folder


@pytest.fixture(scope="module")
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(request.param, tmp_path_factory.mktemp(request.param))
    target = build_family(made.name, made.folder / "target")
    (made.folder / "recipe.yaml").write_text(RECIPE_TEXT.format(target=target))
    write_conversations(target, made.folder / "synth", 12)
    words = ["--backend", "hf", "--conversations", made.folder / "synth", "--output", made.folder / "store"]
    run_here("dump", "run", *made.args(), *words)
    return made


def how_often(family: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a family's tests with vLLM."""
    return [pytest.mark.rare] if family in RARE else [] if family in QUICK else [pytest.mark.long]


every = pytest.mark.parametrize("made", FAMILIES, indirect=True)
in_vllm = pytest.mark.parametrize(
    "made", [pytest.param(name, marks=how_often(name)) for name in IN_VLLM], indirect=True
)
refused = pytest.mark.parametrize("made", REFUSED, indirect=True)


@every
def test_states_of_transformers_give_the_targets_logits_with_our_head(made: Made) -> None:
    printed = run_here("dump", "verify", *made.args(), "--store", made.folder / "store").stdout
    assert "120 of 120 generated tokens of 12 greedy samples are the states' argmax" in printed
    assert "all layers of 8 samples are as transformers computes them" in printed
    store, head, model = Store(made.folder / "store"), read_head(made.target), load_model(made.target, torch.float32)
    sample = store.read_sample(store.sample_ids()[0])
    with torch.inference_mode():
        expected = model.eval()(sample.input_ids.long()[None]).logits[0]
    torch.testing.assert_close(head.logits(sample.hidden_states), expected, rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("method", METHODS)
def test_a_draft_is_trained_evaluated_and_exported(made: Made, method: str) -> None:
    _, folder = made.train(method)
    assert json.loads((folder / "eval.json").read_text())["acceptance_length"] >= 1.0
    config = json.loads((folder / "export/config.json").read_text())
    parameters = made.family.config.get("rope_parameters", {})
    theta = parameters.get("full_attention", parameters).get("rope_theta", made.family.rope_theta)
    assert (config["rope_parameters"]["rope_theta"], config["vocab_size"]) == (theta, 1024)
    assert json.loads((folder / "export/draftline.json").read_text())["num_target_layers"] == made.target.num_layers


@in_vllm
def test_states_of_vllm_are_those_of_transformers(engine: Warm, made: Made) -> None:
    output = made.folder / "of-vllm"
    words = ["--backend", "vllm", "--conversations", made.folder / "synth", "--output", output]
    engine.run("dump", "run", *made.args(*made.family.in_dump), *words)
    ours, theirs = Store(made.folder / "store"), Store(output)
    assert theirs.read_manifest().layer_ids == ours.read_manifest().layer_ids
    assert theirs.sample_ids() == ours.sample_ids()
    for sample_id in ours.sample_ids():
        a, b = ours.read_sample(sample_id), theirs.read_sample(sample_id)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        for states in ("hidden_states", "aux_hidden_states"):
            assert distance(getattr(b, states), getattr(a, states)) < TOLERANCE["float32"] / 10


@in_vllm
@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(name, marks=pytest.mark.rare) for name in METHODS[1:])])
def test_draft_logits_of_the_engine_are_the_trainers(engine: Warm, made: Made, tmp_path: Path, method: str) -> None:
    """Those of a draft far above the target's cap: neither they nor its embeddings are scaled as the target's are."""
    args, trained = made.train(method)
    run = shutil.copytree(trained, tmp_path / "run")
    path = DraftRun(run).chosen_weights()
    weights = {name: 4 * tensor if tensor.dim() > 1 else tensor for name, tensor in load_file(path).items()}
    save_file({**weights, "norm.weight": 8 * weights["norm.weight"]}, path)
    shutil.rmtree(run / "export")
    run_here("train", "export", *args, "--run", run, "--output", tmp_path / "export")
    words = ["--run", run, "--draft", tmp_path / "export", "--store", made.folder / "store", "--samples", 2]
    serving = [word for value in made.family.in_parity for word in ("--set", value)]
    answer = engine.run("bench", "parity", *args, *serving, *words, "--output", tmp_path / "out", check=False)
    if method == "dflash" and made.family.no_dflash:
        assert answer.returncode == 2
        assert made.family.no_dflash in answer.stderr
        return
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads((tmp_path / "out/parity.json").read_text())
    stages = {stage["stage"] for stage in report["stages"]}
    assert {"layer 1", "layer 2", "teacher argmax", "draft slot 1", "draft slot 3"} <= stages
    assert max(stage["difference"] for stage in report["stages"]) < 1e-4
    (trace, _) = read_traces(tmp_path / "out/trainer.safetensors")
    assert trace.tensors["draft_logits"].abs().max() > 2 * families.SOFT_CAP
    if method == "dflash":  # EAGLE3 normalizes embeddings first, which removes a factor
        embedding = read_head(made.target).embedding
        assert torch.equal(trace.tensors["mask_embedding"], embedding[int(trace.tensors["mask_token"])])


@refused
def test_a_target_that_vllm_cannot_run_is_refused_with_the_reason(engine: Warm, made: Made, tmp_path: Path) -> None:
    words = ["--backend", "vllm", "--conversations", made.folder / "synth", "--output", tmp_path / "store"]
    answer = engine.run("dump", "run", *made.args(), *words, check=False)
    assert answer.returncode == 2
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert made.family.refused in line
    assert "dump.backend=hf" in line
    args, run = made.train("dflash")
    words = ["--run", run, "--draft", run / "export", "--store", made.folder / "store", "--output", tmp_path / "out"]
    answer = engine.run("bench", "parity", *args, *words, check=False)
    assert answer.returncode == 2
    assert made.family.refused in answer.stderr


@pytest.mark.parametrize("made", ["glm4"], indirect=True)
def test_a_model_that_hands_out_no_states_is_refused_with_a_way_out(engine: Warm, made: Made, tmp_path: Path) -> None:
    words = ["--backend", "vllm", "--conversations", made.folder / "synth", "--output", tmp_path / "store"]
    dumped = engine.run("dump", "run", *made.args(), *words, check=False)
    args, trained = made.train("dflash")
    served = run("serve", "start", *args, "--draft", trained / "export", "--log", tmp_path / "log", check=False)
    for answer in (dumped, served):
        assert answer.returncode == 2
        assert "found a Glm4ForCausalLM that hands out no hidden states of its layers" in answer.stderr
        assert "Set serve.args.model-impl to transformers" in answer.stderr
        assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("made", ["deepseek_v3"], indirect=True)
def test_latent_attention_with_a_draft_is_refused_on_cpus_with_a_way_out(
    engine: Warm, made: Made, tmp_path: Path
) -> None:
    args, trained = made.train("dflash")
    words = ["--run", trained, "--draft", trained / "export", "--store", made.folder / "store"]
    off = ["--set", "serve.env.VLLM_MLA_DISABLE='0'"]
    answer = engine.run("bench", "parity", *args, *off, *words, "--output", tmp_path, check=False)
    assert answer.returncode == 2
    assert "found latent attention" in answer.stderr
    assert "Set serve.env.VLLM_MLA_DISABLE to '1'" in answer.stderr


def test_the_page_has_a_row_for_each_family() -> None:
    page = (ROOT / "docs/families.md").read_text()
    assert families.replace_table(page) == page, "run `python tests/families.py`"

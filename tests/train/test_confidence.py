"""Claims about confidences: only tried tokens count, and the fitted calibration is the one that was put in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from written import write_store

from contracts.draft import DraftRun
from target.target import Target
from train.confidence import Tried, apply_calibration, calibration_error, fit_calibration, summarize_confidence

SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64, markov_rank: 16"
DSPARK = f"train.draft={{method: dspark, num_speculative_tokens: 3, num_layers: 1, {SIZES}}}"


def draw(scale: float, shift: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences, and acceptances that they predict after a calibration with `scale` and `shift`."""
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.02, 0.98, size)
    return confidences, rng.uniform(size=size) < apply_calibration(confidences, scale, shift)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, -0.7), (1.6, 0.4)])
def test_the_fit_finds_the_calibration_and_removes_the_error(scale: float, shift: float) -> None:
    confidences, accepted = draw(scale, shift, 40_000)
    found = fit_calibration(confidences, accepted)
    assert found == pytest.approx((scale, shift), abs=0.05)
    assert calibration_error(apply_calibration(confidences, *found), accepted) < 0.01
    if scale != 1.0:
        assert calibration_error(confidences, accepted) > 0.05


@pytest.mark.parametrize("accepted", [True, False])
def test_the_fit_stays_finite_when_all_or_no_tokens_are_accepted(accepted: bool) -> None:
    confidences = np.full(200, 0.9)
    scale, shift = fit_calibration(confidences, np.full(200, accepted))
    assert np.isfinite([scale, shift]).all()
    assert abs(float(apply_calibration(confidences, scale, shift)[0]) - accepted) < 0.05


def test_a_report_counts_the_tried_tokens_of_each_position() -> None:
    parts = [
        Tried(np.array([0, 1, 0]), np.array([0.9, 0.8, 0.5]), np.array([True, False, False])),
        Tried(np.array([0]), np.array([0.7]), np.array([True])),
    ]
    first, second = summarize_confidence(parts)["by_position"]
    assert (first["tried"], first["accepted"], first["confidence"]) == (3, 0.6667, 0.7)
    assert (second["tried"], second["accepted"], second["confidence"]) == (1, 0.0, 0.8)


def test_an_export_has_the_calibration_of_its_evaluation_in_fp32(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["--recipe", recipe_path, "--set", DSPARK, "--set", "train.num_steps=20", "--set", "export.dtype=bfloat16"]
    run, report = tmp_path / "run", tmp_path / "eval.json"
    run_here("train", "offline", *args, "--store", store, "--output", run)
    printed = run_here("train", "eval", *args, "--run", run, "--store", store, "--output", report).stdout
    assert "after calibration" in printed
    found = json.loads(report.read_text())["confidence"]
    steps = json.loads(report.read_text())["steps"]
    assert 0 < found["by_position"][0]["tried"] <= steps  # a step at a reply's last token tries none
    assert found["calibrated_error"] <= found["calibration_error"] + 0.02
    run_here("train", "export", *args, "--run", run, "--output", tmp_path / "export", "--eval", report)
    trained = load_file(DraftRun(run).chosen_weights())
    exported = load_file(tmp_path / "export/model.safetensors")
    for name, expected in (
        ("confidence_head.proj.weight", trained["confidence_head.proj.weight"] * found["scale"]),
        ("confidence_head.proj.bias", trained["confidence_head.proj.bias"] * found["scale"] + found["shift"]),
    ):
        torch.testing.assert_close(exported[name], expected)
        assert exported[name].dtype == torch.float32
    assert exported["fc.weight"].dtype == torch.bfloat16
    assert "| draft token | tried | accepted | mean confidence |" in (tmp_path / "export/README.md").read_text()
    report.write_text(json.dumps({**json.loads(report.read_text()), "inputs": {"draft": "another"}}))
    refused = run_here(
        "train", "export", *args, "--run", run, "--output", tmp_path / "other", "--eval", report, check=False
    )
    assert "--eval: found an evaluation of another checkpoint" in refused.stderr

"""Claims about `train compare`: variants see the same batches, gains are paired, and unequal trainings are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_here
from written import write_store

from contracts.acceptance import Acceptance
from target.target import Target

SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64"
VARIANTS = f"""
dflash: []
again: []
dspark: ["train.draft={{method: dspark, num_speculative_tokens: 3, num_layers: 1, markov_rank: 16, {SIZES}}}"]
longer: [train.num_steps=60]
"""


@pytest.fixture
def words(recipe_path: Path, target_folder: Path, tmp_path: Path) -> list[object]:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    (tmp_path / "variants.yaml").write_text(VARIANTS)
    steps = ["--set", "train.num_steps=40", "--set", "train.learning_rate=0.01"]
    places = ["--variants", tmp_path / "variants.yaml", "--store", store, "--held-out", store]
    return ["train", "compare", "--recipe", recipe_path, *steps, *places, "--output", tmp_path / "out"]


def test_variants_are_trained_alike_and_compared_by_sample(words: list[object], tmp_path: Path) -> None:
    printed = run_here(*words).stdout
    assert "note: the variants differ in train.num_steps: [40, 40, 40, 60]; their trainings are not equal" in printed
    result = json.loads((tmp_path / "out/compare.json").read_text())
    by_name = {row["name"]: row for row in result["variants"]}
    assert by_name["again"]["gain_interval"] == [0.0, 0.0]  # the same batches, anchors and first weights
    assert result["best"] == max(by_name, key=lambda name: by_name[name]["acceptance_length"])
    reports = [json.loads((tmp_path / f"out/{name}/eval.json").read_text()) for name in ("dflash", "dspark")]
    parts = [
        [Acceptance.from_steps([a for reply in walk["accepted"] for a in reply], 3) for walk in report["walks"]]
        for report in reports
    ]
    expected = Acceptance.gain_interval(parts[1], parts[0])
    assert by_name["dspark"]["gain_interval"] == pytest.approx(expected, abs=1e-4)
    page = (tmp_path / "out/report.html").read_text()
    assert "dspark" in page
    assert "Their trainings are not equal" in page
    assert "again was trained on 10 of these samples" in page
    assert {row["trained_on"] for row in result["variants"]} == {10}
    assert (tmp_path / "out/dspark/export/config.json").exists()
    assert run_here(*words).stdout.count("is finished, skipped") == 12  # training, evaluation and export of each


def test_a_wrong_variant_is_refused_before_any_is_trained(words: list[object], tmp_path: Path) -> None:
    for text, told in (
        ("dflash: []\nother: [train.draft.methd=dspark]\n", "unknown key 'methd'"),
        ("../x: []\n", "expected a name of letters"),
        ("[]\n", "expected name: [overrides]"),
    ):
        (tmp_path / "variants.yaml").write_text(text)
        result = run_here(*words, check=False)
        assert result.returncode == 2
        assert told in result.stderr
        assert not (tmp_path / "out").exists()

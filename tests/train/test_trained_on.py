"""Claims about evaluations on what the draft was trained on: they are told, counted exactly, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from written import write_store

from contracts.conversation import Sample
from contracts.modelopt import ModelOptStore, write_modelopt
from contracts.rolling import Window, write_index
from contracts.store import Store
from drafts.order import choose_samples
from target.target import Target
from train.trained_on import Trained, count_trained_on

SETTINGS: dict[str, Any] = {"max_samples": None, "held_out_fraction": 0.0, "seed": 0, "global_batch_size": 2}
HELD_OUT = 0.4
TRAIN = (f"held_out_fraction={HELD_OUT}", "num_steps=4", "global_batch_size=2")


def words_of(*settings: str) -> list[str]:
    return [word for one in settings for word in ("--set", f"train.{one}")]


@dataclass
class Case:
    """A draft that was trained on a part of a store, and the stores to evaluate it on."""

    folder: Path
    recipe: Path
    target: Target

    @cached_property
    def store(self) -> Path:
        return write_store(self.folder / "store", self.target)

    @cached_property
    def draft(self) -> Path:
        more = words_of(*TRAIN, "checkpoint_every=2", "keep_checkpoints=3")
        words = ["--recipe", self.recipe, *more, "--store", self.store, "--output", self.folder / "draft"]
        run_here("train", "offline", *words)
        return self.folder / "draft"

    def export(self, folder: Path, *more: str) -> Path:
        words = ["--recipe", self.recipe, *words_of(*more), "--run", self.draft, "--output", folder]
        run_here("train", "export", *words)
        return folder

    def count(self, *words: object, told: bool) -> int | None:
        """What an evaluation counts; `told`: whether it must warn."""
        report = self.folder / "eval.json"
        report.unlink(missing_ok=True)
        said = run_here("train", "eval", "--recipe", self.recipe, *words, "--output", report).stderr
        found: int | None = json.loads(report.read_text())["trained_on"]
        assert (f"eval: warning: the draft was trained on {found} of the " in said) is told, said
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Case:
    return Case(tmp_path_factory.mktemp("case"), recipe_path, Target.read(target_folder))


def copy(store: Path, folder: Path, keeps: Callable[[str], bool]) -> Path:
    """A copy with some of the samples."""
    shutil.copytree(store, folder)
    lines = [line for line in (store / "ledger.jsonl").read_text().splitlines() if keeps(json.loads(line)["id"])]
    (folder / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_an_evaluation_on_the_training_store_warns_and_counts_what_the_steps_reached(case: Case) -> None:
    split = choose_samples(Store(case.store), 256, None, HELD_OUT)
    assert 4 < len(split.train) <= 8  # two steps do not reach all of them, four do
    assert split.held_out
    assert case.count("--run", case.draft, "--store", case.store, told=True) == len(split.train)
    assert case.count("--draft", case.draft / "step-000002", "--store", case.store, told=True) == 4


def test_the_held_out_part_of_the_training_store_is_evaluated_without_a_warning(case: Case, tmp_path: Path) -> None:
    held_out = set(choose_samples(Store(case.store), 256, None, HELD_OUT).held_out)
    store = copy(case.store, tmp_path / "held_out", held_out.__contains__)
    assert case.count("--run", case.draft, "--store", store, told=False) == 0


def test_another_store_counts_the_samples_that_have_the_same_tokens(case: Case, tmp_path: Path) -> None:
    larger = write_store(tmp_path / "larger", case.target, num_samples=14)
    assert Store(larger).checksum != Store(case.store).checksum
    expected = len(choose_samples(Store(case.store), 256, None, HELD_OUT).train)
    assert case.count("--run", case.draft, "--store", larger, told=True) == expected
    other = write_store(tmp_path / "other", case.target, seed=5)
    assert Store(other).sample_ids() == Store(case.store).sample_ids()
    assert case.count("--run", case.draft, "--store", other, told=False) == 0


def test_an_export_knows_by_its_certificate_unless_its_recipe_splits_the_store_differently(
    case: Case, tmp_path: Path
) -> None:
    words = "--store", case.store
    expected = len(choose_samples(Store(case.store), 256, None, HELD_OUT).train)
    assert case.count("--draft", case.export(tmp_path / "same", *TRAIN), *words, told=True) == expected
    assert case.count("--draft", case.export(tmp_path / "other"), *words, told=False) is None


def test_a_finished_evaluation_warns_again(case: Case, tmp_path: Path) -> None:
    words = ["--recipe", case.recipe, "--run", case.draft, "--store", case.store, "--output", tmp_path / "eval.json"]
    first, again = run_here("train", "eval", *words), run_here("train", "eval", *words)
    assert "is finished, skipped" in again.stdout
    assert first.stderr == again.stderr
    assert "eval: warning" in again.stderr


def trained(store: Path, checksum: str, samples: int, **settings: object) -> Trained:
    return Trained(checksum, store, {**SETTINGS, **settings}, 60, 100, (samples, 0))


def test_where_the_training_store_is_gone_or_another_one_nothing_is_said(case: Case, tmp_path: Path) -> None:
    source, larger = Store(case.store), write_store(tmp_path / "larger", case.target, num_samples=14)
    evaluated, ids = Store(larger), Store(larger).sample_ids()
    assert count_trained_on(evaluated, ids, trained(case.store, source.checksum, 10)) == 10
    assert count_trained_on(evaluated, ids[:3], trained(case.store, source.checksum, 10, max_samples=2)) is None
    assert count_trained_on(evaluated, ids[:3], trained(case.store, source.checksum, 2, max_samples=2)) == 2
    assert count_trained_on(evaluated, ids, trained(tmp_path / "gone", source.checksum, 10)) is None
    assert count_trained_on(evaluated, ids, trained(case.store, "0" * 64, 10)) is None
    assert count_trained_on(evaluated, ids, None) is None
    without_files = Path(shutil.copytree(case.store, tmp_path / "without_files"))
    shutil.rmtree(without_files / "samples")
    assert count_trained_on(evaluated, ids, trained(without_files, source.checksum, 10)) is None


def test_equal_names_and_sizes_of_another_tools_files_are_no_proof(case: Case, tmp_path: Path) -> None:
    folders = []
    for seed in (4, 5):
        folders.append(tmp_path / f"modelopt-{seed}")
        folders[-1].mkdir()
        store = Store(write_store(tmp_path / f"store-{seed}", case.target, num_samples=3, seed=seed))
        for number, id_ in enumerate(store.sample_ids()):
            write_modelopt(folders[-1] / f"{number}.pt", str(number), store.read_sample(id_))
    one, other = (ModelOptStore(folder, (1, 2), case.target.hidden_size) for folder in folders)
    assert (one.checksum, one.sample_ids()) == (other.checksum, other.sample_ids())
    facts = trained(one.folder, one.checksum, 3)
    assert [count_trained_on(store, store.sample_ids(), facts) for store in (one, other)] == [3, 0]


def test_a_rolling_store_is_compared_by_its_index_without_samples(case: Case, tmp_path: Path) -> None:
    source = Store(case.store)
    rows = []
    for id_ in source.sample_ids()[:4]:
        tokens = source.read_token_ids(id_)
        if len(rows) == 3:
            tokens = torch.zeros_like(tokens)
        rows.append((id_, Sample(token_ids=tokens.tolist(), loss_spans=[(10, 30)]), {}))
    checksum = write_index(tmp_path / "rolling/index", rows)
    (tmp_path / "rolling/window.json").write_text(Window(num_bytes=1, order={}, index=checksum).model_dump_json())
    facts = trained(tmp_path / "rolling", checksum, 4)
    assert count_trained_on(source, source.sample_ids(), facts) == 3

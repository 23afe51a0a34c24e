"""Claims about failed samples and the mask token: a failure can be retried, and what cannot be trained on stays out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import run_here
from written import write_conversations

from common.errors import IncompleteError, UserError
from contracts.conversation import CONVERSATIONS_FILE
from contracts.ledger import Ledger
from contracts.store import Store, find_token
from distributed.plan import StagePlan
from distributed.stage import task_status
from dump.capture import Staged, Staging
from dump.hf import Transformers
from dump.run import dump
from recipe.load import load_recipe
from recipe.mask import mask_token_of
from recipe.recipe import Recipe
from target.target import Target

COUNT = 27
SHORT = 22  # samples of so few tokens fail: 9 of 27
STRICT = ["dump.backend=hf", "dump.writers=1", "dump.max_reject_fraction=0.1"]
HARMLESS = [
    "serve.args.port=9000",
    "serve.purposes.production.args.max-model-len=4096",
    "serve.variants={other: {path: /w/other, memory_gb: 1}}",
    "serve.variant=other",
    "serve.hardware=h100",
    "serve.backend=sglang",
    "dump.args.max-num-seqs=4",
    "dump.concurrency=3",
    "train.num_steps=7",
]
Break = Callable[[bool], None]


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, ["dump.backend=hf", "dump.writers=1", "dump.max_reject_fraction=1"])


@pytest.fixture(scope="module")
def rows(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(target_folder, tmp_path_factory.mktemp("rows"), COUNT)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Switch: a target whose states of short samples are not finite."""
    forward = Transformers.forward

    def fails(self: Transformers, token_ids: list[int]) -> torch.Tensor:
        states = forward(self, token_ids)
        return states * torch.nan if len(token_ids) <= SHORT + 4 else states

    return lambda on: monkeypatch.setattr(Transformers, "forward", fails if on else forward)


def failed(folder: Path) -> int:
    return Ledger(folder / "ledger.jsonl").counts()["failed"]


def check_whole(store: Store, recipe_path: Path) -> None:
    """Nothing of a retried failure is left in what readers see."""
    assert Ledger(store.ledger_path).counts() == {"done": COUNT, "truncated": 0, "filtered": 0, "failed": 0}
    summary = json.loads((store.folder / "run.json").read_text())["summary"]
    assert (summary["done"], summary["failed"], summary["samples"]) == (COUNT, 0, COUNT)
    assert summary["tokens"] == sum(store.lengths().values())
    assert len(store.sample_ids()) == len(store.lengths()) == COUNT
    assert f"{COUNT} done, 0 truncated, 0 filtered, 0 failed" in run_here("dump", "stats", store.folder).stdout
    assert f"{COUNT} files whole" in run_here("dump", "verify", "-r", recipe_path, "--store", store.folder).stdout


def test_failed_samples_of_a_finished_run_are_captured_again_when_asked_for_and_only_then(
    recipe: Recipe, recipe_path: Path, rows: Path, tmp_path: Path, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(True)
    dump(recipe, rows, tmp_path)
    num_failed = failed(tmp_path)
    assert 0 < num_failed < COUNT
    broken(False)
    dump(recipe, rows, tmp_path)
    assert failed(tmp_path) == num_failed
    assert "is finished, skipped" in capsys.readouterr().out
    dump(recipe, rows, tmp_path, retry_failed=True)
    assert f"{COUNT - num_failed} of {COUNT} samples are there already" in capsys.readouterr().out
    check_whole(Store(tmp_path), recipe_path)
    dump(recipe, rows, tmp_path, retry_failed=True)
    assert "is finished, skipped" in capsys.readouterr().out


def test_a_run_that_stopped_at_too_many_failures_goes_on_also_with_other_settings_that_do_not_change_the_states(
    recipe_path: Path, rows: Path, tmp_path: Path, broken: Break
) -> None:
    strict = load_recipe(recipe_path, STRICT)
    broken(True)
    for retry in (False, True):
        with pytest.raises(IncompleteError, match=r"samples rejected .*not finite.*--retry-failed"):
            dump(strict, rows, tmp_path, retry_failed=retry)
    broken(False)
    with pytest.raises(IncompleteError, match="samples rejected"):
        dump(strict, rows, tmp_path)
    for change, name in (("dump.dtype=bfloat16", "dump.dtype"), ("dump.args.quantization=fp8", "serve.flags")):
        with pytest.raises(UserError, match=rf"settings\.{name}"):
            dump(load_recipe(recipe_path, [*STRICT, change]), rows, tmp_path, retry_failed=True)
    dump(load_recipe(recipe_path, [*STRICT, *HARMLESS]), rows, tmp_path, retry_failed=True)
    check_whole(Store(tmp_path), recipe_path)


def test_failures_of_joined_shards_are_retried_in_a_shard_or_in_the_store(
    recipe: Recipe, recipe_path: Path, rows: Path, tmp_path: Path, broken: Break
) -> None:
    broken(True)
    for shard in ((0, 2), (1, 2)):
        dump(recipe, rows, tmp_path, shard=shard)
    both = failed(tmp_path)
    broken(False)
    dump(recipe, rows, tmp_path, shard=(0, 2), retry_failed=True)
    assert 0 < failed(tmp_path) < both
    plan = StagePlan(stage="dump", recipe="", overrides=[], input="", output=str(tmp_path), shards=2)
    status = task_status(plan, 0)
    assert set(status.counts) == {"done"}
    assert (status.state, status.rows) == ("done", status.counts["done"])
    dump(recipe, rows, tmp_path, retry_failed=True)
    check_whole(Store(tmp_path), recipe_path)
    dump(recipe, rows, tmp_path, shard=(1, 2))  # joins again; its own ledger knows nothing of the second retry
    check_whole(Store(tmp_path), recipe_path)


def test_a_failure_that_shards_of_another_number_made_good_is_no_failure_after_the_return(
    recipe: Recipe, recipe_path: Path, rows: Path, tmp_path: Path, broken: Break
) -> None:
    broken(True)
    dump(recipe, rows, tmp_path, shard=(0, 2))
    broken(False)
    for number in range(3):
        dump(recipe, rows, tmp_path, shard=(number, 3))
    check_whole(Store(tmp_path), recipe_path)
    for number in range(2):
        dump(recipe, rows, tmp_path, shard=(number, 2), retry_failed=True)
    check_whole(Store(tmp_path), recipe_path)


def test_a_sample_with_the_mask_token_is_filtered_and_counted_where_the_draft_has_one(
    recipe: Recipe, recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    rows = write_conversations(target_folder, tmp_path / "rows", COUNT)
    mask_token = mask_token_of(recipe, Target.read(recipe.target.path))
    assert mask_token is not None
    path = rows / CONVERSATIONS_FILE
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (3, 20):
        records[number]["samples"][0]["token_ids"][2] = mask_token
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dump(recipe, rows, tmp_path / "store")
    ledger = Ledger(tmp_path / "store/ledger.jsonl")
    assert ledger.ids("filtered") == [f"{records[number]['id']}-0" for number in (3, 20)]
    assert all(f"the mask token {mask_token}" in ledger.entries[id_]["reason"] for id_ in ledger.ids("filtered"))
    assert json.loads((tmp_path / "store/run.json").read_text())["summary"]["filtered"] == 2
    assert find_token(Store(tmp_path / "store"), mask_token, Store(tmp_path / "store").sample_ids()) is None
    plan = ("-r", recipe_path, "--conversations", rows)
    assert f"samples      {COUNT - 2} (left out: 2 filtered)" in run_here("dump", "plan", *plan).stdout
    without = run_here("dump", "plan", *plan, "--set", "train=null").stdout
    assert f"samples      {COUNT} (left out: none)" in without


class Interrupted(Transformers):
    """Is interrupted after 20 samples; deletes its files when it is closed, as the backend of servers does."""

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        self.folder = staging.folder
        yield from islice(super().capture(samples, staging), 20)
        raise KeyboardInterrupt

    def close(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def test_a_stop_while_samples_wait_for_their_writers_fails_none_of_them(
    recipe: Recipe, recipe_path: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dump.fill.make_backend", Interrupted)
        patch.setattr("dump.writer.STOP_TIMEOUT_S", 300.0)
        with pytest.raises(KeyboardInterrupt):
            dump(load_recipe(recipe_path, ["dump.backend=hf", "dump.preflight=false"]), rows, tmp_path)
    assert 0 < Ledger(tmp_path / "ledger.jsonl").counts()["done"] < COUNT
    assert failed(tmp_path) == 0
    dump(recipe, rows, tmp_path)
    check_whole(Store(tmp_path), recipe_path)


def test_the_disk_must_hold_the_shards_that_are_not_finished(
    recipe: Recipe, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    monkeypatch.setattr("dump.run.refuse_full_disk", lambda folder, num_bytes: asked.append(num_bytes))
    for number in range(3):
        dump(recipe, rows, tmp_path, shard=(number, 3))
    sizes = [json.loads((tmp_path / f"shards/{n:05d}-of-00003/run.json").read_text())["summary"] for n in range(3)]
    for number, planned in enumerate(asked):
        assert planned >= (3 - number) * sizes[number]["bytes"]

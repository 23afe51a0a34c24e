"""Claims about the page of `dump browse`: a store's samples, with what a draft proposed over them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_here
from page_data import text_of, unpack
from trained import Trained

from common.files import read_json
from contracts.proposals import read_proposals
from contracts.store import Store
from drafts.places import spans_of
from target.target import Target


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), recipe_path, Target.read(target_folder))


@pytest.fixture(scope="module")
def draft(trained: Trained) -> Path:
    """A draft that was trained so briefly that it is often wrong."""
    folder = trained.folder / "draft"
    sets = ("num_steps=25", "learning_rate=0.01", "global_batch_size=10", "warmup_steps=2")
    words = [word for one in sets for word in ("--set", f"train.{one}")]
    args = (*trained.args("dflash"), *words, "--store", trained.store("dflash"), "--output", folder)
    run_here("train", "offline", *args)
    return folder


@pytest.fixture(scope="module")
def evaluated(trained: Trained, draft: Path) -> Path:
    """The folder of an evaluation's report and its proposals."""
    folder = trained.folder
    words = ("--run", draft, "--store", trained.store("dflash"))
    trained.eval("dflash", folder / "eval.json", *words, "--proposals", folder / "proposals.jsonl")
    return folder


def test_the_steps_of_a_page_are_those_of_the_evaluation(trained: Trained, evaluated: Path) -> None:
    store = Store(trained.store("dflash"))
    page = evaluated / "page.html"
    run_here("dump", "browse", store.folder, "--proposals", evaluated / "proposals.jsonl", "-o", page)
    report = read_json(evaluated / "eval.json", "a report")
    index, rows = unpack(page)
    assert index["rows"]["id"] == store.sample_ids()
    assert sum(index["rows"]["steps"]) == report["steps"]
    length = 1 + sum(index["rows"]["accepted"]) / report["steps"]
    assert length == pytest.approx(report["acceptance_length"], abs=1e-4)
    assert {accepted for _, ((*_, steps),) in rows for _, accepted, *_ in steps} == {0, 1, 2, 3}
    for number, (id_, (_, ((_, pieces, _, steps),)), walk) in enumerate(
        zip(store.sample_ids(), rows, report["walks"], strict=True)
    ):
        sample = store.read_sample(id_)
        ids = [
            token for piece in pieces for token in (lambda x: x if isinstance(x, list) else [x])(index["ids"][piece])
        ]
        assert ids == sample.input_ids.tolist()
        assert walk["sample"] == id_
        assert [accepted for _, accepted, *_ in steps] == [a for reply in walk["accepted"] for a in reply]
        for place, accepted, *drafted in steps:
            tokens = [index["ids"][piece] for piece in drafted]
            assert tokens[:accepted] == ids[place + 1 : place + 1 + accepted]
            if accepted < len(tokens) and place + 1 + accepted < end_of_reply(sample.loss_mask, place):
                assert tokens[accepted] != ids[place + 1 + accepted]
        assert index["rows"]["supervised"][number] == int(sample.loss_mask.sum())


def end_of_reply(loss_mask, place: int) -> int:
    return next(end for start, end in spans_of(loss_mask) if start <= place < end)


def test_proposals_are_written_when_only_they_are_missing(trained: Trained, draft: Path, evaluated: Path) -> None:
    words = ("--run", draft, "--store", trained.store("dflash"))
    again = trained.eval("dflash", evaluated / "eval.json", *words, "--proposals", evaluated / "proposals.jsonl")
    assert "is finished, skipped" in again.stdout
    other = trained.eval("dflash", evaluated / "eval.json", *words, "--proposals", evaluated / "other.jsonl")
    assert "skipped" not in other.stdout
    assert (evaluated / "other.jsonl").read_bytes() == (evaluated / "proposals.jsonl").read_bytes()


def test_proposals_of_some_samples_show_those(trained: Trained, draft: Path, tmp_path: Path) -> None:
    words = ("--run", draft, "--store", trained.store("dflash"), "--samples", "3")
    trained.eval("dflash", tmp_path / "eval.json", *words, "--proposals", tmp_path / "p.jsonl")
    printed = run_here(
        "dump", "browse", trained.store("dflash"), "--proposals", tmp_path / "p.jsonl", "-o", tmp_path / "page.html"
    ).stdout
    assert "3 of 3 samples" in printed
    assert unpack(tmp_path / "page.html")[0]["rows"]["id"] == list(read_proposals(tmp_path / "p.jsonl").steps)


def test_proposals_over_another_store_are_refused(trained: Trained, evaluated: Path, tmp_path: Path) -> None:
    args = ("--proposals", evaluated / "proposals.jsonl", "-o", tmp_path / "page.html")
    result = run_here("dump", "browse", trained.store("eagle3"), *args, check=False)
    assert result.returncode == 2
    assert "found proposals over another store" in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_page_without_a_draft_shows_the_loss_mask(trained: Trained, tmp_path: Path, target_folder: Path) -> None:
    store = trained.store("dflash")
    run_here("dump", "browse", store, "--target", target_folder, "-o", tmp_path / "all.html")
    index, rows = unpack(tmp_path / "all.html")
    assert index["draft"] == ""
    assert text_of(index, rows[0]).count("«") == 2
    id_ = Store(store).sample_ids()[0]
    run_here("dump", "inspect", store, id_, "--html", tmp_path / "one.html")
    one, (row,) = unpack(tmp_path / "one.html")
    assert text_of(one, row) == text_of(index, rows[0])
    assert "norm of layer 1" in row[0]

"""Claims about the trackers of a training and of bench: all figures, once, no secret, and never an obstacle."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import read_lines, run_here
from tracked import READERS, Curves, Stub
from written import write_store

from bench.track import log_results
from common.trackers import TRACKERS, tracking
from common.trackers.identity import read_identity
from contracts.draft import DraftRun
from contracts.run import Run
from recipe.load import load_recipe
from target.target import Target

HERE = [name for name in TRACKERS if find_spec(name) is not None]
SECRET = "planted" * 6  # wandb refuses keys of fewer than 40 characters
IN_URL = "planted-in-a-url"


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    if "TRACKIO_DIR" not in os.environ:  # read once, when trackio is imported
        os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture
def store(target_folder: Path, tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", Target.read(target_folder), num_samples=20)


def expected_curves(metrics_path: Path) -> Curves:
    """The figures of metrics.jsonl, as trackers get them."""
    curves: Curves = {}
    for line in read_lines(metrics_path):
        places = {f"accuracy/{place}": value for place, value in enumerate(line.get("accuracy", []), start=1)}
        for name, value in {**line, **places}.items():
            if name not in ("step", "seconds", "accuracy"):
                curves.setdefault(name, []).append((line["step"], pytest.approx(value)))
    return curves


def test_a_resumed_training_has_every_figure_once_in_each_tracker_and_no_secret_in_any_file(
    recipe_path: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    recipe = tmp_path / "recipe.yaml"
    text = recipe_path.read_text().replace("\nsynth:", f"\n  env: {{HF_TOKEN: {SECRET}}}\nsynth:")
    recipe.write_text(text + f"tracking: {{train: [{', '.join(HERE)}], name: tiny}}\n")
    draft = DraftRun(tmp_path / "draft")
    sets = ["num_steps=30", "checkpoint_every=15", "held_out_fraction=0.2", "evaluate_every=15", "evaluate_samples=2"]
    args = ["train", "offline", "--recipe", recipe, "--store", store, "--output", draft.folder]
    args += [word for one in sets for word in ("--set", f"train.{one}")]
    args += ["--set", f"serve.env.OTHER={SECRET}", "--set", f"synth.endpoints=['http://me:{IN_URL}@localhost/v1']"]
    run_here(*args)
    first = read_identity(draft.folder)
    assert set(first["trackers"]) == set(HERE)
    shutil.rmtree(draft.step_folder(30))  # as if it had been killed after its last line
    state = json.loads((draft.folder / "run.json").read_text())
    (draft.folder / "run.json").write_text(json.dumps({**state, "complete": False}))
    assert "going on from step 15" in run_here(*args).stdout
    assert read_identity(draft.folder) == first
    assert (first["name"], first["project"], first["fingerprint"]) == ("tiny", "draftline", Run.open(
        draft.folder, "train offline", settings=state["settings"], inputs=state["inputs"], recipe_yaml=""
    ).fingerprint)  # fmt: skip
    expected = expected_curves(draft.metrics_path)
    assert [step for step, _ in expected["loss"]] == [10, 20, 30]
    assert [step for step, _ in expected["held_out_acceptance"]] == [15, 30]
    for name in HERE:
        curves, config = READERS[name](draft.folder)
        # How fast the last steps were, each process measured for itself.
        speeds, found = expected["tokens_per_s"], curves.pop("tokens_per_s")
        assert found[0] == speeds[0]
        assert [step for step, _ in found] == [10, 20, 30]
        assert curves == {key: value for key, value in expected.items() if key != "tokens_per_s"}, name
        if name != "tensorboard":
            assert "checkpoint_every" in str(config)
            assert first["fingerprint"] in str(config)
    folders = [draft.folder, Path(os.environ["TRACKIO_DIR"])]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    sent = [path for path in files if path.parent != draft.folder and "step-" not in str(path)]
    assert len(sent) >= len(HERE)
    assert [path for path in sent if IN_URL.encode() in path.read_bytes()] == []


def test_only_tensorboard_is_written_unless_the_recipe_asks_for_more(
    recipe_path: Path, store: Path, tmp_path: Path
) -> None:
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft")
    assert list(read_identity(tmp_path / "draft")["trackers"]) == ["tensorboard"]
    assert not list(tmp_path.rglob("wandb")) + list(tmp_path.rglob("mlflow"))
    sets = ["--set", "tracking.train=[]"]
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "none", *sets)
    assert not {"trackers.json", "tensorboard"} & {path.name for path in (tmp_path / "none").iterdir()}


def test_a_tracker_that_fails_does_not_stop_a_training_and_is_named_at_the_end(
    recipe_path: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "tracked", "tracked:Stub")
    monkeypatch.setattr(Stub, "failures", 10**9)
    monkeypatch.setattr(Stub, "hangs", threading.Event())
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 5.0)
    sets = ["--set", "tracking.train=[tracked]"]
    args = ["train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft", *sets]
    said = run_here(*args).stderr
    assert said.count("tracked does not answer and is tried again (ConnectionError") == 1
    assert "train offline: not logged to tracked: 2 of 2 entries, steps 10 to 12 (ConnectionError" in said
    assert json.loads((tmp_path / "draft/run.json").read_text())["complete"]


def test_the_card_links_the_runs_that_others_may_reach(recipe_path: Path, store: Path, tmp_path: Path) -> None:
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft")
    path = tmp_path / "draft/trackers.json"
    identity = json.loads(path.read_text())
    identity["trackers"] |= {
        "wandb": {"run_id": "abc", "url": "https://wandb.ai/team/draftline/runs/abc"},
        "mlflow": {"run_id": "def", "url": f"file://{tmp_path}/mlflow"},
    }
    path.write_text(json.dumps(identity))
    run_here("train", "export", "--recipe", recipe_path, "--run", tmp_path / "draft", "--output", tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text()
    assert "| run at wandb | [abc](https://wandb.ai/team/draftline/runs/abc) |" in card
    assert "| run at mlflow | def |" in card
    assert str(tmp_path) not in card
    assert "tensorboard" not in card


def test_results_of_bench_are_logged_once_for_each_change_of_them(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, [f"tracking.bench=[{', '.join(HERE)}]"])
    run = Run.open(tmp_path / "bench", "bench acceptance", settings={}, inputs={"draft": "d"}, recipe_yaml="")
    for figures in (
        {"k3/all/acceptance_length": 2.0},
        {"k3/all/acceptance_length": 2.0},
        {"k7/all/acceptance_length": 2.5},
    ):
        log_results(recipe, run, figures)
        time.sleep(1.1)  # TensorBoard and wandb name files by the second
    for name in HERE:
        curves, _ = READERS[name](run.folder)
        assert curves == {"k3/all/acceptance_length": [(1, 2.0)], "k7/all/acceptance_length": [(2, 2.5)]}

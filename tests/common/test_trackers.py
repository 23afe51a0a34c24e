"""Claims about trackers: everything logged is there once, also after a kill; a tracker that fails stops nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from tracked import READERS, Stub, begin, values_at

import common.trackers
from common.errors import UserError
from common.trackers import TRACKERS, installed_trackers, tracking
from common.trackers.identity import read_identity
from common.trackers.tracking import Tracking

every_tracker = pytest.mark.parametrize(
    "tracker",
    [pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"no {name}")) for name in TRACKERS],
)


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    if "TRACKIO_DIR" not in os.environ:  # read once, when trackio is imported
        os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setitem(TRACKERS, "tracked", "tracked:Stub")
    monkeypatch.setattr(Stub, "logged", [], raising=False)
    monkeypatch.setattr(Stub, "failures", 0)
    monkeypatch.setattr(Stub, "hangs", threading.Event())
    Stub.hangs.set()
    monkeypatch.setattr(tracking, "FIRST_WAIT_S", 0.01)
    return Stub


@every_tracker
def test_steps_values_and_config_can_be_read_back(tracker: str, tmp_path: Path) -> None:
    with Tracking(begin(tmp_path, train={"learning_rate": 0.25}), [tracker]) as opened:
        for step in (1, 2, 3):
            opened.log(values_at(step), step)
        opened.log({"held_out_acceptance": 2.5}, 3)
    curves, config = READERS[tracker](tmp_path)
    assert curves["loss"] == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert curves["accuracy/1"] == [(step, pytest.approx(step / 8)) for step in (1, 2, 3)]
    assert curves["held_out_acceptance"] == [(3, 2.5)]
    if tracker != "tensorboard":
        assert str({"learning_rate": 0.25}) in str(config) or config["train.learning_rate"] == "0.25"
    assert read_identity(tmp_path)["trackers"][tracker]


@every_tracker
def test_a_killed_run_goes_on_as_the_same_run_and_has_every_step_once(tracker: str, tmp_path: Path) -> None:
    child = [sys.executable, str(ROOT / "tests/tracked.py"), tracker, str(tmp_path), "5"]
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"}  # not 15 s
    environment.pop("WANDB_SERVICE", None)  # that of this process
    assert subprocess.run(child, env=environment, check=False).returncode == -9
    known = read_identity(tmp_path)
    time.sleep(1.1)  # TensorBoard and wandb name files by the second, and nobody resumes within the same one
    # Its last checkpoint was after step 3: steps 4 and 5 are done again, and logged at other trackers already.
    with Tracking(begin(tmp_path, first_step=3), [tracker]) as opened:
        for step in range(1, 8):
            opened.log(values_at(step), step)
    assert read_identity(tmp_path) == known
    curves, _ = READERS[tracker](tmp_path)
    for name in ("loss", "accuracy/1"):
        assert sorted(curves[name]) == [(step, pytest.approx(values_at(step)[name])) for step in range(1, 8)]


def test_a_tracker_that_comes_back_gets_everything_in_order(
    stub: type[Stub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.failures = 3
    with Tracking(begin(tmp_path), ["tracked"]) as opened:
        for step in range(1, 6):
            opened.log({"loss": 1.0}, step)
        while len(stub.logged) < 5:
            time.sleep(0.01)
    assert [step for _, step in stub.logged] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("tracked does not answer") == 1
    assert "not logged" not in said
    assert opened.complete


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_tracker_that_stays_away_is_named_with_what_it_lacks_and_nothing_waits_for_it(
    how: str, stub: type[Stub], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.3)
    with Tracking(begin(tmp_path), ["tracked"]) as opened:
        opened.log({"loss": 1.0}, 10)
        while not stub.logged:
            time.sleep(0.01)
        if how == "fails":
            stub.failures = 10**9
        else:
            stub.hangs.clear()
        opened.log({"loss": 1.0}, 20)
        opened.log({"loss": 1.0}, 30)
    said = capsys.readouterr().err
    assert "not logged to tracked: 2 of 3 entries, steps 20 to 30" in said
    assert "a-password" not in said
    assert not opened.complete
    stub.hangs.set()


def test_a_tracker_without_its_library_is_refused_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        installed_trackers(["tensorboard", "wandb"])
    assert installed_trackers(["tensorboard"]) == []

"""Rolling stores: weights equal to the bit to those of a whole store, whatever is killed; a bounded disk."""

from __future__ import annotations

import pickle
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, read_lines, run, run_here
from rolled import GIB, SETTINGS, capture, follow, names, run_master, same_weights, store_bytes, write_whole
from slurm import is_installed, run_slurm
from written import write_conversations

import train.follow
from contracts.rolling import RollingStore
from contracts.run import is_complete
from contracts.shelf import place_key
from dump.capture import Staged, Staging
from dump.hf import Transformers
from train.processes import Processes

PLACES = 96


@pytest.fixture(scope="module")
def conversations(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(target_folder, tmp_path_factory.mktemp("conversations"), 60)


@pytest.fixture(scope="module")
def whole(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(recipe_path, conversations, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def master() -> Iterator[str]:
    with run_master() as address:
        yield address


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The largest number of bytes of a store while it is filled, without the logs and states of its processes."""
    peak, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.01):
            found = 0
            for path in folder.rglob("*"):
                if "shards" in path.parts:
                    continue
                try:
                    found += path.stat().st_size
                except FileNotFoundError:
                    continue
            peak[0] = max(peak[0], found)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def run_together(*commands: list[str], logs: Path, timeout_s: float = 240.0) -> list[str]:
    """Run commands at the same time to their ends, and return what each said; none may fail."""
    files = [(logs / f"{number}.log").open("w+") for number in range(len(commands))]
    running = [
        subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        for words, file in zip(commands, files, strict=True)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in running):
            assert time.monotonic() < deadline, [file.name for file in files]
            assert not any(process.returncode for process in running), [Path(file.name).read_text() for file in files]
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    said = [Path(file.name).read_text() for file in files]
    assert not any(process.returncode for process in running), said
    return said


def test_a_window_gives_the_weights_of_the_whole_store_within_its_bytes(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    window = 0.3 * store_bytes(whole / "store")
    with watched(tmp_path / "store") as peak:
        run_together(
            capture(recipe_path, conversations, tmp_path, window / GIB, "--shard", "0/2"),
            capture(recipe_path, conversations, tmp_path, window / GIB, "--shard", "1/2"),
            follow(recipe_path, tmp_path),
            logs=tmp_path,
        )
    assert same_weights(tmp_path, whole)
    assert 0.8 * window < peak[0] < 1.1 * window
    assert not list((tmp_path / "store/places").rglob("*"))


def take_turns(
    recipe: Path, conversations: Path, folder: Path, window: float, *more: object, max_turns: int = 100
) -> Iterator[str]:
    """Fill the window and train from it in turns, in this process; yield what each turn of the trainer said."""
    for _ in range(max_turns):
        run_here(*names(capture(recipe, conversations, folder, window / GIB, "--until-full", *more)))
        yield run_here(*names(follow(recipe, folder, "--until-empty", *more))).stdout
        if is_complete(folder / "draft"):
            return
    raise AssertionError("the training does not end")


@pytest.mark.long
def test_capture_and_training_may_take_turns_and_go_back_to_an_earlier_checkpoint(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    window, went_back = 0.4 * store_bytes(whole / "store"), False
    for number, said in enumerate(take_turns(recipe_path, conversations, tmp_path, window)):
        steps = sorted((tmp_path / "draft").glob("step-*"))
        if number == 1:
            assert len(steps) == 2
            shutil.rmtree(steps[-1])  # as if it were damaged: the run goes on from the one before
            went_back = True
        elif not is_complete(tmp_path / "draft"):
            assert "the samples of the next step are not there yet" in said
    assert went_back
    assert same_weights(tmp_path, whole)
    assert "is finished, skipped" in run_here(*names(follow(recipe_path, tmp_path))).stdout
    said = run_here(*names(capture(recipe_path, conversations, tmp_path, window / GIB))).stdout
    assert f"{PLACES} samples in the trainer's order, 0 failed" in said
    assert not list((tmp_path / "store/places").rglob("*"))


def test_a_capture_deletes_what_one_that_has_ended_left_behind_the_trainer_and_no_file_in_the_making(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    window = 0.3 * store_bytes(whole / "store")
    first, second = (
        names(capture(recipe_path, conversations, tmp_path, window / GIB, "--until-full", "--shard", f"{number}/2"))
        for number in range(2)
    )
    run_here(*first)
    run_here(*second)
    run_here(*names(follow(recipe_path, tmp_path, "--until-empty")))
    store = RollingStore(tmp_path / "store")
    position = store.read_position()
    assert position is not None
    assert position.first_place > 2
    unfinished = [store.sample_path(place_key(place)) for place in (position.first_place + 8, position.first_place + 9)]
    unfinished = [path.with_name(f".{path.name}.tmp") for path in unfinished]
    for path in unfinished:
        path.touch()
    run_here(*first)
    places = [int(path.stem) for path in (tmp_path / "store/places").rglob("*.safetensors")]
    assert min(places) >= position.first_place
    own = position.first_place % 2  # 0: the first of the two files is of shard 0
    assert [path.exists() for path in unfinished] == ([False, True] if own == 0 else [True, False])


def test_held_out_samples_stay_and_choose_the_same_best_checkpoint(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    more = ["--set", "train.held_out_fraction=0.15", "--set", "train.evaluate_every=10"]
    args = ["--recipe", recipe_path, *SETTINGS, *more]
    run_here("train", "offline", *args, "--store", whole / "store", "--output", tmp_path / "whole/draft")
    window = 0.9 * store_bytes(whole / "store")
    list(take_turns(recipe_path, conversations, tmp_path, window, *more))
    assert same_weights(tmp_path, tmp_path / "whole")
    best = [(folder / "draft/best.json").read_text() for folder in (tmp_path, tmp_path / "whole")]
    assert best[0] == best[1]


def test_a_sample_that_cannot_be_captured_is_replaced_by_one_of_its_batch_and_counted(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = Transformers.capture

    def fail_at(self: Transformers, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        for name, token_ids in samples:
            if name in (place_key(5), place_key(9)):
                yield Staged(name, None, "the engine says no")
            else:
                yield from captured(self, iter([(name, token_ids)]), staging)

    monkeypatch.setattr(Transformers, "capture", fail_at)
    window, more = 0.5 * store_bytes(whole / "store"), ("--set", "dump.max_reject_fraction=0.03")
    list(take_turns(recipe_path, conversations, tmp_path, window, *more))
    said = run_here(*names(capture(recipe_path, conversations, tmp_path, window / GIB, *more))).stdout
    assert f"{PLACES - 2} samples in the trainer's order, 2 failed" in said
    entries = read_lines(tmp_path / "store/shards/00000-of-00001/ledger.jsonl")
    assert {entry["id"]: entry["reason"] for entry in entries} == {
        place_key(5): "the engine says no",
        place_key(9): "the engine says no",
    }
    assert not same_weights(tmp_path, whole)


@pytest.mark.long
def test_failed_samples_of_a_window_and_held_out_ones_are_captured_again(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--set", "train.held_out_fraction=0.15", "--set", "train.evaluate_every=10"]
    args = ["--recipe", recipe_path, *SETTINGS, *more]
    run_here("train", "offline", *args, "--store", whole / "store", "--output", tmp_path / "whole/draft")
    window, captured = 0.9 * store_bytes(whole / "store"), Transformers.capture

    def fail_early(self: Transformers, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        for name, token_ids in samples:
            if name < place_key(9) or not name.isdecimal():
                yield Staged(name, None, "the engine says no")
            else:
                yield from captured(self, iter([(name, token_ids)]), staging)

    fill = capture(
        recipe_path, conversations, tmp_path, window / GIB, "--until-full", "--set", "dump.preflight=false", *more
    )
    with monkeypatch.context() as patch:
        patch.setattr(Transformers, "capture", fail_early)
        run_here(*names(fill), "--set", "dump.max_reject_fraction=0.5")
    ledger = tmp_path / "store/shards/00000-of-00001/ledger.jsonl"
    failed = [entry["id"] for entry in read_lines(ledger)]
    assert len(failed) > len([name for name in failed if name.isdecimal()]) == 9
    run_here(*names(fill), "--retry-failed")
    assert [(entry["id"], entry["status"]) for entry in read_lines(ledger)[len(failed) :]] == [
        (name, "done") for name in failed
    ]
    list(take_turns(recipe_path, conversations, tmp_path, window, *more))
    assert same_weights(tmp_path, tmp_path / "whole")


def test_too_many_failures_stop_the_capture(
    recipe_path: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Transformers, samples: Iterator[tuple[str, list[int]]], _staging: Staging) -> Iterator[Staged]:
        for name, _ in samples:
            yield Staged(name, None, "the engine says no")

    monkeypatch.setattr(Transformers, "capture", fail)
    words = names(capture(recipe_path, conversations, tmp_path, 0.01, "--until-full", "--no-preflight"))
    result = run_here(*words, check=False)
    assert result.returncode == 1
    assert "samples rejected (the first: the engine says no)" in result.stderr


def test_what_cannot_work_is_refused_beforehand(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    def refused(words: list[str]) -> str:
        result = run_here(*names(words), check=False)
        assert result.returncode == 2, result.stderr
        return result.stderr.splitlines()[-1]

    small = refused(capture(recipe_path, conversations, tmp_path / "small", 1e-5))
    assert "--window: found 1e-05 GiB, expected at least" in small
    assert "the largest step" in small
    assert "found a whole store" in refused(capture(recipe_path, conversations, whole, 0.01))
    assert "found a whole store, expected a rolling one" in refused(follow(recipe_path, whole))
    window = ["--until-full", "--no-preflight"]
    run_here(*names(capture(recipe_path, conversations, tmp_path, 0.001, *window)))
    assert "(num_bytes)" in refused(capture(recipe_path, conversations, tmp_path, 0.002, "--shard", "0/2"))
    other_seed = refused(follow(recipe_path, tmp_path, "--set", "train.seed=7"))
    assert "window.json (train.seed): found 0, expected 7" in other_seed
    args = ["--recipe", recipe_path, *SETTINGS]
    whole_store = command("dump", "run", *args, "--conversations", conversations, "--output", tmp_path / "store")
    assert "found a rolling store" in refused(whole_store)
    without = command("train", "offline", *args, "--store", tmp_path / "store", "--output", tmp_path / "draft")
    assert "Train on it with --follow" in refused(without)
    start = refused(follow(recipe_path, tmp_path, "--set", f"train.init_from={whole / 'draft'}"))
    assert "train.held_out_fraction" in start


def test_a_sample_with_other_tokens_than_the_index_is_refused(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    run_here(*names(capture(recipe_path, conversations, tmp_path, 0.001, "--until-full", "--no-preflight")))
    store = RollingStore(tmp_path / "store")
    assert len(store.index.ids) == 60
    assert "index" not in vars(pickle.loads(pickle.dumps(store)))  # it goes to the writers with every sample
    shutil.copy(store.sample_path(place_key(1)), store.sample_path(place_key(0)))
    result = run_here(*names(follow(recipe_path, tmp_path, "--until-empty")), check=False)
    assert result.returncode == 2
    assert "000000000000.safetensors: found other token ids than the index has for this place" in result.stderr


def test_a_trainer_that_waits_says_which_capture_owes_the_sample_and_when_it_last_wrote(
    recipe_path: Path,
    conversations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = ("--set", "train.held_out_fraction=0.15")
    for shard in ("0/2", "1/2"):
        args = ("--until-full", "--no-preflight", "--shard", shard, *held_out)
        run_here(*names(capture(recipe_path, conversations, tmp_path, 0.001, *args)))
    monkeypatch.setattr(train.follow, "SAY_EVERY_S", 0.3)
    follower, stopped = train.follow.Follower(RollingStore(tmp_path / "store"), batch_size=4), {"signal": False}
    threading.Timer(0.5, stopped.update, [{"signal": True}]).start()
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    assert follower.wait_for_step(23, alone, stopped, until_empty=False) == "stop"
    (said,) = capsys.readouterr().err.splitlines()
    assert "s for the sample at place 92 (step 24), which `dump run --window --shard 0/2` captures" in said
    assert re.search(r"it last wrote \S+/shards/00000-of-00002/capture.json \d+ s ago", said)

    sample_id = follower.plan.chosen.held_out[1]  # that of the second capture process
    RollingStore(tmp_path / "store").sample_path(sample_id).unlink()
    threading.Timer(0.5, follower.stop).start()
    with pytest.raises(train.follow.Stopped):
        follower.wait_for_held_out(sample_id)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"s for held-out sample {sample_id}, which `dump run --window --shard 1/2` captures" in said


def test_sigterm_saves_and_stops_a_trainer_that_waits(recipe_path: Path, conversations: Path, tmp_path: Path) -> None:
    run_here(*names(capture(recipe_path, conversations, tmp_path, 0.001, "--until-full", "--no-preflight")))
    store = RollingStore(tmp_path / "store")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(follow(recipe_path, tmp_path), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (position := store.read_position()) or position.waited_s < 1.0:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    assert "stopped by SIGTERM after step" in (tmp_path / "log").read_text()
    steps = [int(path.name[5:]) for path in (tmp_path / "draft").glob("step-*")]
    position = store.read_position()
    assert position is not None
    assert position.first_place == 4 * max(steps)


@pytest.mark.long
def test_twenty_kills_of_either_side_change_nothing(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    window, rng = 0.15 * store_bytes(whole / "store"), random.Random(0)
    sides = {
        "capture 0": capture(recipe_path, conversations, tmp_path, window / GIB, "--shard", "0/2"),
        "capture 1": capture(recipe_path, conversations, tmp_path, window / GIB, "--shard", "1/2"),
        "trainer": follow(recipe_path, tmp_path),
    }
    kills, running = 0, dict[str, subprocess.Popen[bytes]]()
    deadline = time.monotonic() + 900
    with watched(tmp_path / "store") as peak, (tmp_path / "log").open("w") as log:
        try:
            while not all(process.poll() == 0 for process in running.values()) or len(running) < len(sides):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                for name, words in sides.items():
                    code = running[name].poll() if name in running else -signal.SIGKILL
                    assert code in (None, 0, -signal.SIGKILL), (name, (tmp_path / "log").read_text()[-3000:])
                    if code == -signal.SIGKILL:
                        running[name] = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
                time.sleep(rng.uniform(0.2, 6.0))
                at_work = [process for process in running.values() if process.poll() is None]
                if kills < 20 and at_work:
                    rng.choice(at_work).send_signal(signal.SIGKILL)
                    kills += 1
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    assert kills == 20
    assert same_weights(tmp_path, whole)
    assert peak[0] < 1.1 * window
    assert not list((tmp_path / "store/places").rglob("*"))


@pytest.mark.long
@pytest.mark.rare
def test_two_processes_follow_together(recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path) -> None:
    window = 0.3 * store_bytes(whole / "store")
    ranks = ["--nproc-per-node", "2", "--no-python", *follow(recipe_path, tmp_path)]
    alone = [*command("train", "offline", "--recipe", recipe_path, *SETTINGS), "--store", str(whole / "store")]
    torchrun = command("torchrun", "--standalone")
    run_together([*torchrun, *ranks], capture(recipe_path, conversations, tmp_path, window / GIB), logs=tmp_path)
    whole_by_two = [*torchrun, "--nproc-per-node", "2", "--no-python", *alone, "--output", str(tmp_path / "two/draft")]
    run_together(whole_by_two, logs=tmp_path)
    assert same_weights(tmp_path, tmp_path / "two")


@pytest.mark.long
@pytest.mark.rare
def test_turns_on_one_node_as_a_submitted_task(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path
) -> None:
    window = 0.5 * store_bytes(whole / "store")
    words = ["distributed", "submit", "rolling", "--recipe", recipe_path, *SETTINGS, "--input", conversations]
    run(*words, "--output", tmp_path, "--window", window / GIB, "--in-turns", "--cluster", "debug")
    shutil.move(tmp_path / "train", tmp_path / "draft")
    assert same_weights(tmp_path, whole)


@pytest.mark.long
@pytest.mark.skipif(not is_installed(), reason="needs root and Debian's slurm-wlm and munge")
@pytest.mark.parametrize("shelf", ["files", pytest.param("mooncake", marks=pytest.mark.rare)])
def test_capture_and_training_as_jobs_of_slurm(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path, shelf: str, request: pytest.FixtureRequest
) -> None:
    where = ["--mooncake", request.getfixturevalue("master")] if shelf == "mooncake" else []
    window, one_thread = 0.3 * store_bytes(whole / "store"), ["--set", "train.num_threads=1"]
    args = ["--recipe", recipe_path, *SETTINGS, *one_thread]
    run_here("train", "offline", *args, "--store", whole / "store", "--output", tmp_path / "alone/draft")
    with run_slurm(tmp_path / "slurm") as environment:

        def say(*words: object) -> str:
            return subprocess.run(
                [str(word) for word in words], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout

        submitted = command(
            "distributed", "submit", "rolling", *args, "--input", conversations, "--window", window / GIB
        )
        say(*submitted, *where, "--output", tmp_path / "run", "--time", 10, "--cpus-per-task", 1)
        status, seen, deadline = command("distributed", "status", tmp_path / "run"), "", time.monotonic() + 300
        while say("squeue", "-h", "-o", "%i").strip():
            assert time.monotonic() < deadline, [path.read_text() for path in (tmp_path / "run").rglob("*log.*")]
            if "waits for samples" in (shown := say(*status)):
                seen = shown
            time.sleep(1.0)
        assert "% of the time it waits for samples" in seen
        assert "1 done" in say(*status)
    shutil.move(tmp_path / "run/train", tmp_path / "draft")
    assert same_weights(tmp_path, tmp_path / "alone")

"""Claims about the status of a run: the states of its stages, what is broken, how to go on, and when a watch ends."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import run_here
from run_folder import RunFolder, fill

from common.files import lock_file
from distributed.plan import StagePlan
from distributed.stage import RunReader
from distributed.state import RECENT_S, StageStatus
from distributed.status import note_lines
from distributed.watch import IDLE_S, Lines, Screen, verdict, watch


def test_a_recipes_run_has_its_stages_in_order_and_each_its_state(folder: RunFolder) -> None:
    stages = fill(folder).read()
    assert [(label, stage.state) for label, stage in stages.items()] == [
        ("synth/train", "done"), ("synth/held_out", "done"), ("store/train", "running"), ("store/held_out", "failed"),
        ("draft", "running"), ("export", "waiting"), ("bench", "waiting"),
    ]  # fmt: skip
    assert stages["synth/train"].counts == {"done": 6, "truncated": 1, "filtered": 1, "failed": 1}
    assert (stages["store/train"].rows, stages["store/train"].total, stages["store/train"].is_estimate) == (3, 7, True)
    assert (stages["draft"].rows, stages["draft"].total, stages["draft"].rows_per_s) == (30, 100, 2.0)
    assert stages["draft"].seconds_left == 35
    assert [stage.warnings for stage in stages.values()] == [()] * 7


def test_how_to_go_on_is_the_command_that_ran_with_what_is_needed_and_without_secrets(folder: RunFolder) -> None:
    fill(folder)
    notes = "\n".join(note_lines(RunReader(folder.path).read(), folder.path))
    assert "synth generate --prompts p.jsonl --output runs/synth/train --retry-failed\n" in notes
    assert "dump run --set 'serve.env.HF_TOKEN=<redacted>' --output x/store/held_out" in notes
    assert "(put in what <redacted> stands for)" in notes
    assert "train offline" not in notes


def test_shards_are_one_stage_and_those_that_are_not_there_wait(folder: RunFolder) -> None:
    for number in (0, 2):
        label = f"synth/shards/{number:05d}-of-00003"
        folder.begin(label)
        folder.write_rows(label, "done", "failed")
        folder.stop(label, done=1, failed=1)
    stage = folder.read()["synth"]
    assert [task.state for task in stage.tasks] == ["done", "waiting", "done"]
    assert (stage.state, stage.rows, len(stage.failed)) == ("waiting", 4, 2)
    folder.begin("synth/shards/00001-of-00003")
    folder.stop("synth/shards/00001-of-00003", done=0)
    assert f"    synth merge {folder.path / 'synth'}" in note_lines([folder.read()["synth"]], folder.path)
    folder.begin("synth")
    folder.write_rows("synth", "done", "done", "failed")
    folder.stop("synth", done=2, failed=1)
    stage = folder.read()["synth"]
    assert (stage.state, stage.rows, len(stage.tasks)) == ("done", 3, 1)


def test_shards_of_another_number_take_over_what_earlier_ones_left(folder: RunFolder) -> None:
    earlier, later = "synth/shards/00000-of-00001", [f"synth/shards/{number:05d}-of-00002" for number in (0, 1)]
    folder.begin(earlier)
    folder.write_rows(earlier, "done", "failed")
    folder.stop(earlier)
    assert folder.read()["synth"].state == "failed"
    folder.begin(later[0])
    folder.begin(later[1])
    (folder.path / later[0] / "ledger.jsonl").write_text(  # the failed row again
        (folder.path / earlier / "ledger.jsonl").read_text().splitlines()[1].replace("failed", "done") + "\n"
    )
    for label in later:
        folder.stop(label, done=1)
    stage = folder.read()["synth"]
    assert [task.folder.name for task in stage.tasks] == [Path(label).name for label in (earlier, *later)]
    assert (stage.state, stage.counts) == ("waiting", {"done": 2})
    assert not stage.is_joined


def test_failed_tasks_of_a_submission_are_retried_by_distributed(folder: RunFolder) -> None:
    for stage in ("synth", "dump"):
        plan = StagePlan(stage=stage, recipe="r", overrides=[], input="i", output=str(folder.path / stage), shards=2)
        plan.save()
    folder.begin("synth/shards/00001-of-00002")
    folder.stop("synth/shards/00001-of-00002")
    stages = RunReader(folder.path).read()
    assert [(stage.label, stage.state) for stage in stages] == [("synth", "failed"), ("dump", "waiting")]
    notes = note_lines(stages, folder.path)
    assert [line for line in notes if line.startswith("    ")] == [f"    distributed retry {folder.path}"]


def test_damaged_and_half_written_files_are_named_and_stop_nothing(folder: RunFolder) -> None:
    fill(folder)
    torn = (folder.path / "store/train/run.json").read_text()[:50]
    (folder.path / "store/train/run.json").write_text(torn)
    (folder.path / "synth/train/run.json").write_text('["no run"]')
    (folder.path / "synth/held_out/ledger.jsonl").write_text('{"id": "a", "status": "done"}\n{"id"\n{"half')
    with (folder.path / "draft/metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": "low"}\n{"step": 50, "lo')
    (folder.path / "store/held_out/command.txt").write_text("dump run 'never closed\n")
    (folder.path / "bench").mkdir()
    (folder.path / "bench/distributed.json").write_text("{")
    (folder.path / "eval.json").write_text('{"acceptance_length": 2.1, "per_position": "none"}')
    (folder.path / "eval-b.json").write_bytes(b"\xff{")
    page = folder.path / "page.html"
    said = run_here("distributed", "status", folder.path, "--output", page).stdout + page.read_text()
    for telling in (
        "store/train: run.json: broken JSON", "synth/train: run.json: no JSON object",
        "synth/held_out: ledger.jsonl: line 2 is broken", "draft: metrics.jsonl: line 7 is broken",
        "eval.json: not as this version writes it", "eval-b.json: broken JSON", "bench/distributed.json: found broken",
        "command.txt does not tell",
    ):  # fmt: skip
        assert telling in said, said
    assert folder.read()["draft"].rows == 30


def test_a_ledger_that_is_not_what_its_run_says_is_named(folder: RunFolder) -> None:
    folder.begin("synth")
    folder.write_rows("synth", "done", "done")
    folder.stop("synth", done=3, failed=0)
    assert folder.read()["synth"].warnings == ("ledger.jsonl has 2 done, and run.json says 3 done",)


def test_a_folder_without_stages_is_refused(tmp_path: Path) -> None:
    result = run_here("distributed", "status", tmp_path, check=False)
    assert (result.returncode, "found no run.json" in result.stderr) == (2, True)
    result = run_here("distributed", "status", tmp_path / "none", check=False)
    assert (result.returncode, "found no such folder" in result.stderr) == (2, True)


@dataclass
class Script:
    """A display that lets something happen after each look."""

    events: list[Callable[[], object]]
    seen: list[list[str]] = field(default_factory=list)

    def show(self, stages: list[StageStatus]) -> None:
        self.seen.append([stage.state for stage in stages])
        if self.events:
            self.events.pop(0)()


def test_a_watch_ends_by_itself_when_all_is_done(folder: RunFolder) -> None:
    folder.begin("synth")
    script = Script([lambda: folder.write_rows("synth", "done"), lambda: folder.stop("synth", done=1)])
    pages: list[bool] = []
    code = watch(RunReader(folder.path), script, 0.0, lambda _, goes_on: pages.append(goes_on))
    assert code == 0
    assert script.seen == [["running"], ["running"], ["done"]]
    assert pages == [True, True, False]


def test_a_watch_ends_with_an_error_when_something_failed_and_nothing_works(folder: RunFolder) -> None:
    folder.begin("synth")
    folder.begin("store")

    def die() -> None:
        folder.stop("store")
        folder.age(2 * RECENT_S)

    script = Script([lambda: folder.stop("synth", done=1), die])
    assert watch(RunReader(folder.path), script, 0.0) == 1
    assert script.seen[-1] == ["done", "failed"]


def test_a_failed_stage_may_be_restarted_at_once_or_others_may_still_work(folder: RunFolder) -> None:
    fill(folder)
    now = time.time()
    stages = RunReader(folder.path).read()
    assert verdict(stages, now + IDLE_S) is None  # others work
    for label in list(folder.runs):
        folder.stop(label)
    stages = RunReader(folder.path).read()
    assert verdict(stages, now) is None
    ended = verdict(stages, now + 2 * RECENT_S)
    assert ended is not None
    assert ended[0] == 1


def test_stages_that_are_never_begun_do_not_keep_a_watch_for_ever(folder: RunFolder) -> None:
    folder.begin("synth/train")
    folder.stop("synth/train", done=1)
    stages, now = RunReader(folder.path).read(), time.time()
    assert verdict(stages, now) is None
    ended = verdict(stages, now + 2 * IDLE_S)
    assert ended is not None
    assert ended[0] == 0
    plan = StagePlan(stage="dump", recipe="r", overrides=[], input="i", output=str(folder.path / "dump"))
    plan.save()
    assert verdict(RunReader(folder.path).read(), now + 2 * IDLE_S) is None  # a job may wait for days


def test_without_a_terminal_there_is_a_line_for_each_change(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder)
    reader, lines = RunReader(folder.path), Lines(folder.path)

    def look() -> list[str]:
        lines.show(reader.read())
        return [line[20:] for line in capsys.readouterr().out.splitlines()]

    assert len(look()) == 7 + 4  # each stage; two commands with their reasons
    folder.write_rows("store/train", "done")
    assert look() == []
    monkeypatch.setattr("distributed.watch.LINE_INTERVAL_S", 0.0)
    folder.write_rows("store/train", "done")
    assert look() == ["store/train: 1 running; 5 rows; about 2 of 7 rows remain"]
    folder.stop("draft")
    changed = look()
    assert changed[0] == "draft: 1 failed; 30 steps; 70 of 100 steps remain"
    assert changed[-1].endswith("train offline --output draft")


def test_a_terminal_is_redrawn_in_place_within_its_size_and_obeys_no_data(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin("synth", f"synth generate --output \x1b[2J\x07synth{'x' * 100}")
    for number in range(6):
        folder.begin(f"draft/{number}\x1b[2J")
    folder.stop("synth")
    monkeypatch.setenv("COLUMNS", "60")
    reader, screen = RunReader(folder.path), Screen(folder.path)

    def look(num_lines: int) -> tuple[str, int]:
        """What is written, and how many rows of the terminal it takes."""
        monkeypatch.setenv("LINES", str(num_lines))
        screen.show(reader.read())
        text = capsys.readouterr().out
        shown = text.partition("\x1b[J")[2]
        assert "\x1b" not in shown
        assert "\x07" not in shown
        return text, sum(-(-max(1, len(line)) // 60) for line in shown.splitlines())

    first, height = look(50)
    assert first.startswith("\x1b[J")
    assert "    synth generate --output '?[2J?synthxxx" in first
    second, height_of_second = look(8)
    assert second.startswith(f"\x1b[{height}F\x1b[J")
    assert height_of_second <= 7
    assert second.endswith(" more lines\n")


def test_a_command_watches_and_writes_a_page_that_no_longer_reloads_at_the_end(folder: RunFolder) -> None:
    folder.begin("synth")
    folder.write_rows("synth", "done")
    folder.stop("synth", done=1)
    result = run_here("distributed", "status", folder.path, "--watch", "--html", "--every", 0.1)
    assert result.stdout.endswith("synth: 1 done; 1 rows; 0 of 1 rows remain\ndone\n")
    assert 'data-reload-s="0"' in (folder.path / "status.html").read_text()
    folder.begin("draft")
    folder.stop("draft")
    folder.age(2 * RECENT_S)
    result = run_here("distributed", "status", folder.path / "draft", "--watch", check=False)
    assert result.returncode == 1


def test_a_look_at_a_run_never_keeps_it_from_starting(folder: RunFolder) -> None:
    folder.begin("synth")
    folder.stop("synth")
    with (folder.path / "synth/run.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        release = threading.Timer(0.02, lock.close)
        release.start()
        folder.begin("synth")
        release.join()
    with (folder.path / "synth/run.lock").open("a") as file:
        assert not lock_file(file, folder.path, wait=False)

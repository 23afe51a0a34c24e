"""One HTML page of a run: its stages, curves, figures, what is wrong and how to go on. It loads nothing.

Writes: the page, atomically. While `distributed status --watch` rewrites it, it reloads itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

from common.html import Script, Table, write_page
from contracts.tally import count_reason
from distributed.charts import WIDE, Chart, Line, draw
from distributed.figures import Acceptance, FigureReader, Speed
from distributed.found import EXPORT
from distributed.next_steps import list_next_steps
from distributed.state import StageStatus
from distributed.status import STATES, count_text, duration

TEMPLATE = Path(__file__).with_name("status.html.j2")
SCRIPT = Path(__file__).with_name("status.js")
NUM_COLOURS = 10
NUM_FIGURE_COLOURS = 6
"""Colours in status.css: a sequence, and after it those of figures, in pairs of predicted and served."""
MAX_FILES = 60
MAX_EXAMPLES = 3
MIN_QUIET_S = 600.0
STEPS = (
    ("synth", ("synth prepare", "synth generate")),
    ("dump", ("dump run",)),
    ("train", ("train offline",)),
    ("export", (EXPORT,)),
    ("bench", ("bench acceptance", "bench gate", "bench lossless", "bench accuracy", "bench sweep")),
)


@dataclass(frozen=True)
class StageRow:
    """A row of the table of stages, as text."""

    status: StageStatus
    name: str
    rows: str
    share: float | None
    rate: str
    left: str
    time: str
    changed: str
    changed_at: str
    detail: str


@dataclass(frozen=True)
class FileLink:
    """A file's name, its address relative to the page, and its size."""

    name: str
    address: str
    size: str


class PageWriter:
    """Writes a run's page again and again."""

    def __init__(self, folder: Path, page: Path, every_s: float | None) -> None:
        """`every_s`: how often it is rewritten; None: once."""
        self._folder, self._page, self._every_s = folder, page, every_s
        self._figures = FigureReader(folder)

    def write(self, stages: list[StageStatus], goes_on: bool) -> None:
        """Write the page. `goes_on`: whether it will be written again. Raises UnwritableError."""
        now = time.time()
        accepted, speeds, problems = self._figures.read(stages)
        warnings = [(stage.label or stage.name, text) for stage in stages for text in _warnings(stage, now)]
        warnings += [("figures", text) for text in problems]
        trainings = [(stage.label or stage.name, _curves(stage)) for stage in stages if stage.curves]
        write_page(
            self._page,
            TEMPLATE,
            title=name_of(self._folder),
            folder=str(self._folder),
            state=overall_state(stages),
            written_at=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
            written=int(now),
            reload_s=self._every_s if goes_on else None,
            steps=_steps(stages),
            rows=[_row(stage, now) for stage in stages],
            shards=[(stage.label or stage.name, _shard_table(stage, now)) for stage in stages if len(stage.tasks) > 1],
            windows=[(stage.label or stage.name, stage.window) for stage in stages if stage.window],
            warnings=warnings,
            next_steps=list_next_steps(stages, self._folder),
            failed=_failed_table(stages),
            filtered=_filtered_table(stages),
            trainings=[(name, charts) for name, charts in trainings if charts],
            acceptance=_acceptance_chart(accepted),
            lengths=_length_table(accepted),
            speeds=_speed_table(speeds),
            files=self._list_files(stages),
            script=Script(SCRIPT.read_text(encoding="utf-8")),
        )

    def _list_files(self, stages: Sequence[StageStatus]) -> list[tuple[str, list[FileLink]]]:
        """Return the files directly in the run's folder and in those of its stages."""
        folders = {self._folder: str(self._folder)}
        for stage in stages:
            folders.setdefault(stage.folder, stage.label)
            if stage.is_submitted:
                folders.setdefault(stage.folder / "jobs", f"{stage.label}/jobs".lstrip("/"))
        lists = [(name, self._list_folder(folder)) for folder, name in folders.items()]
        return [(name, links) for name, links in lists if links]

    def _list_folder(self, folder: Path) -> list[FileLink]:
        try:
            paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
            paths = [path for path in paths if path.suffix not in (".lock", ".pkl", ".sh")]
            if len(paths) > MAX_FILES:
                paths = sorted(paths, key=lambda path: path.stat().st_mtime)[-MAX_FILES:]
            return [self._link(path) for path in sorted(paths)]
        except OSError:  # not there yet, or changed meanwhile
            return []

    def _link(self, path: Path) -> FileLink:
        # Quoted and begun with a dot: a name can be no address of another kind.
        address = quote(f"./{relpath(path.absolute(), self._page.absolute().parent)}")
        return FileLink(path.name, address, size_text(path.stat().st_size))


def overall_state(stages: Sequence[StageStatus]) -> str:
    """Return the state of a run: running if a stage is, failed if one is and none runs, done if all are."""
    states = {stage.state for stage in stages}
    return next((state for state in ("running", "failed", "waiting") if state in states), "done")


def name_of(folder: Path) -> str:
    """Return a folder's own name, also of `.` and `..`."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def size_text(num_bytes: float) -> str:
    """Return a size, as in `3 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _steps(stages: Sequence[StageStatus]) -> list[tuple[str, str]]:
    """Return the stages of a pipeline and the state of each, without those that the run does not have."""
    found = [(name, [stage for stage in stages if stage.name in names]) for name, names in STEPS]
    return [(name, overall_state(of_name)) for name, of_name in found if of_name]


def _row(stage: StageStatus, now: float) -> StageRow:
    rows, share = f"{stage.rows:,}" if stage.kind and stage.changed else "", None
    if rows and stage.total:
        rows += f" of {'about ' if stage.is_estimate else ''}{stage.total:,}"
        share = 1.0 if stage.state == "done" else min(1.0, stage.rows / stage.total)
    rate = stage.rows_per_s or (stage.rows / stage.seconds if stage.state == "done" and stage.seconds else 0.0)
    left = stage.seconds_left
    return StageRow(
        status=stage,
        name=stage.label or name_of(stage.folder),
        rows=f"{rows} {stage.unit}" if rows else "",
        share=share,
        rate=f"{rate:.2f} {stage.unit}/s" if rate and stage.kind else "",
        left=f"about {duration(left)}" if left is not None else "",
        time=duration(stage.seconds) if stage.seconds else "",
        changed=f"{duration(max(0.0, now - stage.changed))} ago" if stage.changed else "",
        changed_at=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(stage.changed)) if stage.changed else "",
        detail=_detail(stage),
    )


def _detail(stage: StageStatus) -> str:
    """Return what else there is to say of a stage, in a few words."""
    parts = [count_text(stage.counts)]
    if len(stage.tasks) > 1:
        parts.insert(0, "shards: " + ", ".join(f"{stage.states[name]} {name}" for name in STATES if stage.states[name]))
    if stage.state == "running" or stage.kind == "train":
        parts += [task.note for task in stage.tasks[:1]]
    if isinstance(tokens := stage.summary.get("tokens"), int):
        parts.append(f"{tokens:,} tokens")
    if isinstance(size := stage.summary.get("bytes"), int):
        parts.append(size_text(size))
    if isinstance(length := stage.summary.get("acceptance_length"), float):
        parts.append(f"acceptance length {length:.3f}")
    return "; ".join(part for part in parts if part)


def _warnings(stage: StageStatus, now: float) -> list[str]:
    found = list(stage.warnings)
    if stage.curves is not None and stage.curves.nan_step is not None:
        found.append(f"the loss is no number since step {stage.curves.nan_step}")
    if stage.state == "running" and stage.changed and now - stage.changed > MIN_QUIET_S:
        found.append(f"a process is at work, and no file has changed for {duration(now - stage.changed)}")
    if (count := stage.states["failed"]) and len(stage.tasks) > 1:
        found.append(f"{count} of {len(stage.tasks)} shards stopped before their end, and no process works on them")
    elif count:
        found.append("stopped before its end, and no process works on it")
    if count := stage.counts["failed"]:
        found.append(f"{count} failed {'row' if count == 1 else 'rows'}, with their reasons below")
    return found


def _shard_table(stage: StageStatus, now: float) -> Table:
    rows = [
        (
            task.folder.name, task.state, count_text(task.counts), f"{task.rows:,}", f"{task.rows_per_s:.2f}",
            f"{duration(max(0.0, now - task.changed))} ago" if task.changed else "",
        )
        for task in stage.tasks
    ]  # fmt: skip
    columns = ("shard", "state", "rows by status", stage.unit, f"{stage.unit}/s", "last activity")
    return Table(columns, rows, num_text=3)


def _failed_table(stages: Sequence[StageStatus]) -> Table | None:
    """Return the reasons of failed rows, the most frequent first, with examples."""
    rows = []
    for stage in stages:
        reasons: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        for id_, reason in stage.failed:
            examples.setdefault(count_reason(reasons, reason), []).append(id_)
        for reason, count in reasons.most_common():
            rows.append((stage.label or stage.name, reason, ", ".join(examples[reason][:MAX_EXAMPLES]), count))
    return Table(("stage", "reason (N: a number)", "such as", "rows"), rows, num_text=3) if rows else None


def _filtered_table(stages: Sequence[StageStatus]) -> Table | None:
    rows = [
        (stage.label or stage.name, reason, count)
        for stage in stages
        for reason, count in stage.filtered.most_common()
    ]  # fmt: skip
    return Table(("stage", "reason (N: a number)", "rows"), rows, num_text=2) if rows else None


def _curves(stage: StageStatus) -> list[Chart]:
    """Return the charts of a training."""
    assert stage.curves is not None
    points, held_out = stage.curves.points, stage.curves.held_out
    num_places = max((len(point.accuracy) for point in points), default=0)
    accuracy = [
        Line(
            f"{place + 1}",
            [(point.step, point.accuracy[place]) for point in points if place < len(point.accuracy)],
            colour=round(place * (NUM_COLOURS - 1) / max(1, num_places - 1)),
        )
        for place in range(num_places)
    ]
    accepted = [Line("training blocks", [(point.step, 1 + point.blocks_accepted) for point in points])]
    if held_out:
        accepted.append(Line("held out, predicted", [(step, length) for step, length in held_out], NUM_COLOURS, "dots"))
    charts = [
        draw("loss", "step", [Line("loss", [(point.step, point.loss) for point in points])]),
        draw("accuracy of draft token", "step", accuracy, from_zero=True),
        draw("acceptance length", "step", accepted),
        draw(
            "learning rate",
            "step",
            [Line("learning rate", [(p.step, p.learning_rate) for p in points])],
            from_zero=True,
        ),
    ]
    return [chart for chart in charts if chart]


def _acceptance_chart(accepted: Sequence[Acceptance]) -> Chart | None:
    """Return the chart: predictions are broad lines, so that what is served can lie upon them."""
    lines = []
    for is_served in (False, True):
        chosen = [found for found in accepted if found.is_served == is_served]
        for number, found in enumerate(chosen):
            colour = NUM_COLOURS + (2 * number + is_served) % NUM_FIGURE_COLOURS
            points = [(float(place), rate) for place, rate in enumerate(found.per_position, start=1)]
            name = f"{'served' if is_served else 'predicted'}: {found.label}"
            look = "dots" if is_served else "broad"
            lines.append(Line(name, points, colour, look, f"(length {found.length:.3f})"))
    return draw("acceptance rate", "draft token", lines, from_zero=True, width=WIDE)


def _length_table(accepted: Sequence[Acceptance]) -> Table | None:
    rows = [
        (
            found.label,
            "served" if found.is_served else "predicted",
            f"{found.length:.3f}",
            f"{found.interval[0]:.3f} to {found.interval[1]:.3f}" if found.interval else "",
            len(found.per_position),
        )
        for found in accepted
    ]
    return Table(("figures", "by", "acceptance length", "95% interval", "K"), rows, num_text=2) if rows else None


def _speed_table(speeds: Sequence[Speed]) -> Table | None:
    numbers = sorted({k for speed in speeds for k in speed.drafted})
    rows = [
        (
            speed.label,
            speed.concurrency,
            f"{speed.baseline:.1f}",
            *(f"{speed.drafted[k]:.1f}" if k in speed.drafted else "" for k in numbers),
            f"{max(speed.drafted.values()) / speed.baseline:.2f}x" if speed.drafted and speed.baseline else "",
        )
        for speed in speeds
    ]
    columns = ("tokens/s", "concurrency", "no draft", *(f"K = {k}" for k in numbers), "best speed-up")
    return Table(columns, rows) if rows else None

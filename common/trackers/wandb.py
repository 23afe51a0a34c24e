"""Weights & Biases. Writes: FOLDER/wandb/, or WANDB_DIR.

Mode, entity, server and key come from WANDB_MODE, WANDB_ENTITY, WANDB_BASE_URL and WANDB_API_KEY (or `wandb login`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from common.trackers.tracker import TrackedRun

INIT_TIMEOUT_S = 30.0  # then tried again; the process cannot end before
FINISH_TIMEOUT_S = 50.0
LOGIN_TIMEOUT_S = 20.0  # a prompt that nobody answers


class Wandb:
    """Implements `Tracker`. The run's id is ours, so that every process continues the same run."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = Path(os.environ.get("WANDB_DIR", run.folder))

    def start(self) -> dict[str, str]:
        run = self._run
        settings = wandb.Settings(
            x_disable_meta=True,  # it holds the command line, which may hold secrets
            console="off",  # so may what is printed
            disable_git=True,
            save_code=False,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            login_timeout=LOGIN_TIMEOUT_S,
            quiet=True,
        )
        self._wandb = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            job_type=run.stage,
            config=dict(run.config),
            dir=str(self._folder),
            settings=settings,
        )
        if self._wandb.offline:
            rows = (record.history for record in read_offline(self._folder, run.id) if record.HasField("history"))
            self._last_step = max((row.step.num for row in rows), default=-1)
            return {"run_id": run.id}
        self._last_step = self._wandb.starting_step - 1  # the server's
        return {"run_id": run.id, "url": str(self._wandb.url)}

    def last_step(self, _metric: str, /) -> int:
        return self._last_step

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._wandb.log(dict(values), step=step)

    def finish(self, failed: bool, /) -> None:
        self._wandb.finish(exit_code=int(failed))


HEADER_BYTES = 7
BLOCK_BYTES = 32768
WHOLE, LAST = 1, 4
"""Kinds of parts of a record."""


def read_offline(folder: Path, run_id: str) -> Iterator[Record]:
    """Yield the records of a run's offline files, one file for each process.

    They are in LevelDB's log format after a header of 7 bytes: blocks of 32 KiB with parts of records, each part with
    checksum (4 bytes), size (2) and kind (1). A record is a protobuf message.
    Source: github.com/google/leveldb/blob/main/doc/log_format.md; wandb's datastore.
    """
    for path in sorted((folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")):
        data, at, record = path.read_bytes(), HEADER_BYTES, b""
        while at + HEADER_BYTES <= len(data):
            left = BLOCK_BYTES - at % BLOCK_BYTES
            if left < HEADER_BYTES:  # the rest of a block
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            at += HEADER_BYTES + size
            if at > len(data):  # torn
                break
            record += data[at - size : at]
            if kind in (WHOLE, LAST):
                yield Record.FromString(record)
                record = b""

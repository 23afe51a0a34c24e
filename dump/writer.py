"""Store staged samples in separate processes.

In the engine's process, writers would compete with it for the GIL. As processes of lower priority they use the CPU time
that the engine leaves idle.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from common.tensor_file import Buffer
from contracts.sample_file import mask_of
from contracts.store import Store, StoredSample
from dump.capture import Captured, CaptureError, Staged, load_staged
from dump.kept import Kept
from dump.samples import Capturable

PR_SET_PDEATHSIG = 1  # prctl(2)
LOWEST_PRIORITY = 19
STOP_TIMEOUT_S = 15.0
_buffer = Buffer()  # of this writer process, reused for every sample


@dataclass(frozen=True)
class StoreJob:
    """The settings that all samples of a run share."""

    store: Store
    dtype: str
    num_layers: int
    hidden_size: int
    kept: Kept = field(default_factory=Kept)


@contextmanager
def open_writers(num_writers: int) -> Iterator[ProcessPoolExecutor]:
    """Start writer processes that end with this one, even if killed. Forked ones would copy the engine.

    At the end they store what they have begun. After STOP_TIMEOUT_S they are killed: on a busy machine, processes of
    such low priority take minutes to end. The next run captures again what was not stored.
    """
    pool = ProcessPoolExecutor(num_writers, multiprocessing.get_context("spawn"), initializer=_set_up)
    try:
        yield pool
    finally:
        processes = list(pool._processes.values())  # Python 3.14 has kill_workers()
        killer = threading.Timer(STOP_TIMEOUT_S, _kill, [processes])
        killer.start()
        pool.shutdown(cancel_futures=True)
        killer.cancel()


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _set_up() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage handles Ctrl-C and ends its writers
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    _yield_to_the_engine()


def _yield_to_the_engine() -> None:
    """Run at idle priority, because all threads of the engine wait if one of them waits for a core."""
    if sys.platform.startswith("linux"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(LOWEST_PRIORITY)


def store_sample(job: StoreJob, row: Capturable, staged: Staged) -> dict[str, Any]:
    """Check and durably store a staged sample; return its ledger entry.

    Raises OSError, e.g. for a full disk; UserError if the most likely tokens do not fit into a GPU's memory.
    """
    try:
        captured = load_staged(staged, row.sample.token_ids, job.num_layers, job.hidden_size)
    except CaptureError as error:
        return {"id": row.sample_id, "status": "failed", "reason": str(error)}
    stored = job.kept.trim(make_stored(row, captured))
    keeps = job.kept.final_state == "pre-norm"
    fields = job.store.write_sample(row.sample_id, stored, job.dtype, _buffer, final_states=keeps)
    return {"id": row.sample_id, "status": "done", "tokens": row.num_tokens, **fields}


def make_stored(row: Capturable, captured: Captured) -> StoredSample:
    """Return the stored form of a sample, with its mask and metadata."""
    mask = mask_of(row.sample.loss_spans, row.num_tokens)
    ids = torch.tensor(row.sample.token_ids, dtype=torch.int32)
    return StoredSample(ids, mask, captured.final, captured.layers.flatten(1), row.metadata)

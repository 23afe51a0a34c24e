"""The process of one of several vLLM engines of a dump: `python -m dump.engine_process FD`.

FD is its end of the connection with the stage (dump/vllm_engines.py): first an `EngineJob` comes in and `Ready` goes
out, then `(sample id, token ids)` come in and `Staged` go out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

from dump.capture import Staging
from dump.vllm_engines import EngineJob, Ready
from dump.vllm_offline import VllmOffline
from serve.vllm_main import die_with_parent

Inbox = SimpleQueue[tuple[str, list[int]] | None]


def main() -> None:
    """Run an engine until the stage closes the connection."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # vLLM then ends its own processes
    die_with_parent()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # vLLM's processes must not keep the connection open
    connection = Connection(descriptor)
    job: EngineJob = connection.recv()
    engine = VllmOffline(job.recipe, job.target, job.layer_ids, Staging(job.folder, 0))
    connection.send(Ready(engine.token_bytes, engine.max_requests))
    inbox = Inbox()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    with contextlib.suppress(ConnectionError):  # the stage has stopped
        _run(engine, connection, inbox)


def _read(connection: Connection, inbox: Inbox) -> None:
    """Read requests as they come, so that the stage never waits for a step of the engine; None at the end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(None)


def _run(engine: VllmOffline, connection: Connection, inbox: Inbox) -> None:
    while True:
        while not engine.is_busy or not inbox.empty():
            sample = inbox.get()
            if sample is None:
                return
            engine.add(*sample)
        for staged in engine.step():
            connection.send(staged)


if __name__ == "__main__":
    main()

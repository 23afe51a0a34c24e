"""What a scheduler's task does: run one stage's command, stop it cleanly when it is told to, and be queued again.

submitit pickles a task, calls it on the node, and calls `checkpoint` when SLURM's signal comes before preemption or the
time limit; what `checkpoint` returns is queued again. Stages resume by themselves, so a task carries no state.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import submitit

ROOT = Path(__file__).resolve().parent.parent
_running: list[subprocess.Popen[bytes]] = []
"""The command of the task that this process runs; not a part of the task, which is pickled."""


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@dataclass(frozen=True)
class Task:
    """One command, as words, with additions to the environment; it works in the project's folder."""

    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> None:
        """Run to the end. Raises RuntimeError for any exit code but 0."""
        words = self.resolve()
        print(f"+ {shlex.join(words)}", flush=True)
        environment = {**os.environ, **self.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        # SLURM's warning reaches every process of the task; only this one may take it for more than a death sentence.
        process = subprocess.Popen(
            words, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, preexec_fn=_ignore_warning
        )
        _running.append(process)
        while (code := process.poll()) is None:
            time.sleep(0.2)
        if code:
            raise RuntimeError(f"`{shlex.join(words)}` ended with exit code {code}: its message is in this task's log")

    def resolve(self) -> list[str]:
        """The words to run on this node."""
        return list(self.words)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the command, which saves what it has, and ask to be queued again."""
        for process in _running:
            process.send_signal(signal.SIGTERM)
        for process in _running:
            # Not process.wait(): this runs in a signal handler, in the middle of a poll() that holds its lock.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class TorchrunTask(Task):
    """`words` under torchrun, one agent a task: `-m train.cli offline ...` on every node of a job.

    The agents meet at the first node, on a port that follows from the job's number.
    """

    processes_per_node: int = 1

    def resolve(self) -> list[str]:
        num_nodes = os.environ.get("SLURM_NTASKS", "1")
        job, rank = os.environ.get("SLURM_JOB_ID", str(os.getpid())), os.environ.get("SLURM_PROCID", "0")
        first = first_host(os.environ.get("SLURM_JOB_NODELIST"))
        port = 20000 + int(job) % 20000
        return [
            str(Path(sys.executable).with_name("torchrun")),
            f"--nnodes={num_nodes}", f"--node-rank={rank}", f"--nproc-per-node={self.processes_per_node}",
            "--max-restarts=3",  # of all processes, when one dies; they go on from the last checkpoint
            "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:{port}", f"--rdzv-id={job}", *self.words,
        ]  # fmt: skip


def first_host(nodes: str | None) -> str:
    """The first host of SLURM's node list ("node[03-10]"); this one without a list."""
    if not nodes:
        return "127.0.0.1"
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return names.stdout.split()[0]


def stage_words(stage: str, *args: str) -> tuple[str, ...]:
    """A stage's command in this environment."""
    return (str(Path(sys.executable).with_name(stage)), *args)


def worker_words(args: Sequence[str]) -> tuple[str, ...]:
    """worker.sh with its arguments."""
    return ("bash", str(ROOT / "distributed/worker.sh"), *args)

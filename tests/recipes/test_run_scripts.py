"""Claims about the recipes' run.sh: every command in it exists with every flag it is given, in their order."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import ROOT

import bench.cli
import dump.cli
import recipe.cli
import serve.cli
import synth.cli
import train.cli
from recipe.load import load_recipe

APPS = {
    "recipe": recipe.cli.app, "synth": synth.cli.app, "dump": dump.cli.app, "train": train.cli.app,
    "serve": serve.cli.app, "bench": bench.cli.app,
}  # fmt: skip
STUB = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]) + "\\n")
"""


def make_stubs(folder: Path) -> tuple[Path, Path]:
    """Make commands that only log their arguments; return the log and the commands' folder."""
    log, stubs = folder / "log", folder / "bin"
    stubs.mkdir()
    for name in (*APPS, "torchrun"):
        (stubs / name).write_text(STUB.format(python=sys.executable, log=str(log)))
        (stubs / name).chmod(0o755)
    return log, stubs


@pytest.mark.parametrize("folder", ["MiniMax-M3-DFlash", "Qwen3-8B"])
@pytest.mark.parametrize(("recipe", "num_train", "num_held_out"), [("recipe.yaml", 297, 3), ("smoke.yaml", 8, 2)])
def test_the_script_gives_every_command_flags_that_it_has(
    tmp_path: Path, folder: str, recipe: str, num_train: int, num_held_out: int
) -> None:
    log, stubs = make_stubs(tmp_path)
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(300)))
    environment = {
        **os.environ,
        "DRAFTLINE_BIN": str(stubs),
        "GPUS": "8",
        "RECIPE": f"recipes/{folder}/{recipe}",
    }
    script = ROOT / f"recipes/{folder}/run.sh"
    subprocess.run([script, prompts, run, "--set", "train.seed=1"], check=True, env=environment)

    assert len((run / "prompts/train.jsonl").read_text().splitlines()) == num_train
    assert len((run / "prompts/held_out.jsonl").read_text().splitlines()) == num_held_out
    called = [json.loads(line) for line in log.read_text().splitlines()]
    steps = []
    for name, *args in called:
        if name == "torchrun":
            assert args[:5] == ["--standalone", "--nproc-per-node", "8", "-m", "train.cli"]
            name, args = "train", args[5:]
        command: Any = typer.main.get_command(APPS[name])
        # Raises for a flag that does not exist, or one that is missing.
        command.commands[args[0]].make_context(args[0], args[1:])
        steps.append(f"{name} {args[0]}")
        if "--recipe" in args:
            assert args[args.index("--recipe") + 1] == environment["RECIPE"]
            assert "train.seed=1" in args
    assert list(dict.fromkeys(steps)) == [
        "recipe check", "synth generate", "synth stats", "dump plan", "dump run", "dump verify", "bench gate",
        "train offline", "train eval", "train export", "bench acceptance", "serve command",
    ]  # fmt: skip
    assert called[-3][:2] == ["train", "export"]  # once more, for certificate and card
    assert "--served" in called[-3]
    assert called[-2][:3] == ["train", "export", "--check"]


@pytest.mark.parametrize("gpus", [1, 2, 3, 5, 8])
def test_qwens_script_gives_each_gpu_at_most_four_samples_and_at_least_one(tmp_path: Path, gpus: int) -> None:
    log, stubs = make_stubs(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n' * 10)
    for name in ("recipe.yaml", "eagle3.yaml", "dspark.yaml", "smoke.yaml"):
        path = ROOT / "recipes/Qwen3-8B" / name
        environment = {**os.environ, "DRAFTLINE_BIN": str(stubs), "GPUS": str(gpus), "RECIPE": str(path)}
        script = ROOT / "recipes/Qwen3-8B/run.sh"
        subprocess.run([script, tmp_path / "prompts.jsonl", tmp_path / "run"], check=True, env=environment)
        _, *args = json.loads(log.read_text().splitlines()[-1])
        train = load_recipe(path, [value for flag, value in itertools.pairwise(args) if flag == "--set"]).training()
        assert train.batch_size >= gpus
        if name != "smoke.yaml":
            assert math.ceil(train.batch_size / gpus) <= 4


@pytest.mark.parametrize("public", [False, True])
def test_smollms_script_gives_every_command_flags_that_it_has(tmp_path: Path, public: bool) -> None:
    log, stubs = make_stubs(tmp_path)
    (stubs / "python").symlink_to(stubs / "train")
    run = tmp_path / "run"
    environment = {**os.environ, "DRAFTLINE_BIN": str(stubs), **({"PUBLIC_PROMPTS": str(tmp_path)} if public else {})}
    script = ROOT / "recipes/SmolLM2-135M/run.sh"
    subprocess.run([script, run, "--set", "train.seed=1"], check=True, env=environment)
    called = [json.loads(line) for line in log.read_text().splitlines()]
    steps = []
    for name, *args in called:
        if name == "python":
            steps.append(Path(args[2] if args[0] == "-m" else args[0]).stem)
            continue
        command: Any = typer.main.get_command(APPS[name])
        command.commands[args[0]].make_context(args[0], args[1:])
        steps.append(f"{name} {args[0]}")
        assert "train.seed=1" in args or "--check" in args
    splits = 2 + public
    assert steps == [
        "download", "convert_gguf", "make_prompts", *["synth generate"] * splits, *["dump run"] * splits, "dump verify",
        "train offline", "train eval", "train export", *["train eval", "bench acceptance"] * (splits - 1),
        "train export", "train export",
    ]  # fmt: skip

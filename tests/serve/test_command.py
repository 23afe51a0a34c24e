"""Claims about the vLLM command: what it says, and which drafts it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from conftest import run

from bench.draft_tokens import with_draft_tokens
from common.errors import UserError
from recipe.load import load_recipe
from serve.command import Serving, build_command
from serve.flags import speculative_overrides, to_flags
from target.target import Target


def write_draft(folder: Path, target: Target, **changes: object) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["DFlashDraftModel"],
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "block_size": 8,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_draft_is_served_with_one_token_less_than_its_block(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path)
    target = Target.read(recipe.target.path)
    command = build_command(recipe, target, port=8123, serving=Serving(write_draft(tmp_path / "draft", target)))
    config = json.loads(command.args[command.args.index("--speculative-config") + 1])
    assert config == {"method": "dflash", "model": str(tmp_path / "draft"), "num_speculative_tokens": 7}
    assert command.args[command.args.index("--host") + 1] == "127.0.0.1"
    assert command.args[command.args.index("--max-model-len") + 1] == "256"


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_target_layers"])
def test_a_draft_that_does_not_match_the_target_is_refused(recipe_path: Path, tmp_path: Path, key: str) -> None:
    recipe = load_recipe(recipe_path)
    target = Target.read(recipe.target.path)
    draft = write_draft(tmp_path / "draft", target, **{key: 1})
    with pytest.raises(UserError, match=rf"{key} = 1, expected"):
        build_command(recipe, target, port=8123, serving=Serving(draft))


def test_a_draft_trained_for_other_weights_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path)
    target = Target.read(recipe.target.path)
    draft = write_draft(tmp_path / "draft", target)
    (draft / "draftline.json").write_text(json.dumps({"target_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="a draft for target 000000000000"):
        build_command(recipe, target, port=8123, serving=Serving(draft))
    small = tmp_path / "small"  # where the command is only printed, as on a login node, nothing is compared
    small.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (small / name).symlink_to(target.path / name)
    assert build_command(recipe, Target.read(small), port=8123, serving=Serving(draft)).args


def test_a_schedule_that_vllm_would_ignore_cut_or_break_with_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    target = Target.read(load_recipe(recipe_path).target.path)
    draft = write_draft(tmp_path / "draft", target)

    def build(*overrides: str) -> list[str]:
        schedule = "serve.speculative.num_speculative_tokens_per_batch_size=[[1, 4, 7], [5, 8, 0]]"
        recipe = load_recipe(recipe_path, [schedule, *overrides])
        return build_command(recipe, target, port=1, serving=Serving(draft)).args

    assert '"num_speculative_tokens_per_batch_size": [[1, 4, 7], [5, 8, 0]]' in build()[-1]
    for override, message in {
        "serve.speculative.num_speculative_tokens=3": "found 7 draft tokens, expected at most num_speculative_tokens",
        "serve.args.data-parallel-size=2": "found a schedule with data-parallel-size 2, expected 1: vLLM says",
        "serve.speculative.parallel_drafting=true": "found a schedule for a draft with parallel_drafting",
        "serve.speculative.method=medusa": "found a schedule for method medusa, expected another method",
    }.items():
        with pytest.raises(UserError, match=message):
            build(override)


def test_a_fixed_number_of_draft_tokens_replaces_a_schedule_of_the_recipe_and_of_its_variant(recipe_path: Path) -> None:
    schedule = "{num_speculative_tokens: 7, num_speculative_tokens_per_batch_size: [[1, 8, 5]], attention_backend: X}"
    small = f"serve.variants.small={{path: x, memory_gb: 1, speculative: {schedule}}}"
    sets = [f"serve.speculative={schedule}", small, "serve.variant=small"]
    found = speculative_overrides(with_draft_tokens(load_recipe(recipe_path, sets), 3).serve)
    assert found == {"num_speculative_tokens": 3, "attention_backend": "X"}


def test_booleans_become_flags_and_their_negations() -> None:
    assert to_flags({"enforce-eager": True, "async-scheduling": False, "block-size": 128}) == [
        "--enforce-eager",
        "--no-async-scheduling",
        "--block-size",
        "128",
    ]


def test_the_printed_command_survives_a_shell(recipe_path: Path) -> None:
    override = "serve.args.hf-overrides='{\"a b\": 1}'"
    printed = run("serve", "command", "--recipe", recipe_path, "--port", "8001", "--set", override).stdout
    words = shlex.split(printed)
    assert words[words.index("--port") + 1] == "8001"
    assert words[words.index("--hf-overrides") + 1] == '{"a b": 1}'


@pytest.mark.parametrize("flag", ["tool-call-parser", "reasoning-parser"])
def test_sglang_is_refused_parsers_for_synthesis_too(recipe_path: Path, target_folder: Path, flag: str) -> None:
    recipe = load_recipe(recipe_path, ["serve.backend=sglang", f"serve.sglang_args={{{flag}: x}}"])
    with pytest.raises(UserError, match=f"{flag}: found x, expected none for synth"):
        build_command(recipe, Target.read(target_folder), port=1, serving=Serving(purpose="synth"))

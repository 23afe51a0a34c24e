"""Claims about what a resumed stage compares of the `serve` section: all that changes the output, and only that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipe.load import load_recipe
from serve.settings import engine_settings, measured_settings, output_settings

BASE = (
    "serve.variants={small: {path: /w/small, memory_gb: 1, args: {kv-cache-dtype: fp8}}, "
    "other: {path: /w/other, memory_gb: 1, args: {dtype: half}}}"
)


def settings(recipe_path: Path, *overrides: str, purpose: Any = "synth") -> dict[str, Any]:
    return output_settings(load_recipe(recipe_path, [BASE, *overrides]), purpose)


@pytest.mark.parametrize(
    "override",
    [
        "serve.args.port=9000",
        "serve.port=9000",
        "serve.host=0.0.0.0",
        "serve.startup_timeout_s=7",
        "serve.args.gpu-memory-utilization=0.5",
        "serve.args.max-num-seqs=64",
        "serve.args.max_num_seqs=64",
        "serve.args.no-enable-log-requests=true",
        "serve.args.served-model-name=mine",
        "serve.purposes.production.args.max-model-len=4096",
        "serve.purposes.bench.args.dtype=half",
        "serve.variants.other.args.dtype=float32",
        "serve.heads={one: {path: x, method: eagle3, num_speculative_tokens: 3}}",
        "serve.speculative.attention_backend=FLASH_ATTN",
        "serve.image=vllm:other",
        "dump.args.enforce-eager=true",
        "serve.hardware=h100",
        "serve.args.no-enforce-eager=true",
        "serve.args.tensor-parallel-size=4",
    ],
)
def test_what_does_not_change_the_output_is_left_out(recipe_path: Path, override: str) -> None:
    assert settings(recipe_path, override) == settings(recipe_path)


@pytest.mark.parametrize(
    "override",
    [
        "serve.args.dtype=bfloat16",
        "serve.args.quantization=fp8",
        "serve.purposes.synth.args.kv-cache-dtype=fp8",
        "serve.variant=small",
        "serve.backend=sglang",
        "serve.args.no-async-engine=true",
    ],
)
def test_what_changes_the_output_is_compared(recipe_path: Path, override: str) -> None:
    assert settings(recipe_path, override) != settings(recipe_path)


def test_the_last_layer_of_flags_wins(recipe_path: Path) -> None:
    purpose = "serve.purposes.synth.args.kv-cache-dtype=auto"
    found = settings(recipe_path, "serve.variant=small", purpose, "dump.args.kv-cache-dtype=bfloat16")
    assert found == {
        "backend": "vllm",
        "weights": "/w/small",
        "flags": {"dtype": "float32", "kv-cache-dtype": "auto"},
    }
    dump = settings(recipe_path, "dump.args.kv-cache-dtype=bfloat16", purpose="dump")
    assert dump["flags"]["kv-cache-dtype"] == "bfloat16"


def test_a_variants_folder_may_move_and_its_weights_may_not_change(
    recipe_path: Path, target_folder: Path, other_target_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(target_folder)
    one, moved, other = (
        settings(recipe_path, "serve.variant=small", f"serve.variants.small.path={path}")
        for path in (target_folder, tmp_path / "moved", other_target_folder)
    )
    assert one == moved
    assert one["weights"] != other["weights"]


@pytest.mark.parametrize(
    ("override", "compared"),
    [
        ("serve.args.port=9000", False),
        ("serve.purposes.production.args.max-num-seqs=64", False),
        ("serve.args.max-num-seqs=64", True),
        ("serve.args.gpu-memory-utilization=0.5", True),
        ("serve.speculative.attention_backend=FLASH_ATTN", True),
        ("serve.variants.small.speculative.attention_backend=FLASH_ATTN", True),
        ("serve.variants.other.speculative.attention_backend=FLASH_ATTN", False),
        ("target.max_model_len=128", True),
        ("serve.args.tensor-parallel-size=4", True),
    ],
)
def test_a_measurement_also_compares_what_changes_the_speed(recipe_path: Path, override: str, compared: bool) -> None:
    base = [BASE, "serve.variant=small"]
    plain, changed = (measured_settings(load_recipe(recipe_path, [*base, *more])) for more in ([], [override]))
    assert (plain != changed) == compared


def test_sglang_serves_synthesis_alone_and_a_dump_of_its_own_engine_has_neither_variant_nor_node(
    recipe_path: Path,
) -> None:
    sglang = ["serve.backend=sglang", "serve.sglang_args.quantization=fp8"]
    assert settings(recipe_path, *sglang) != settings(recipe_path)
    for purpose in ("dump", "bench"):
        assert settings(recipe_path, *sglang, purpose=purpose) == settings(recipe_path, purpose=purpose)
    plain = engine_settings(load_recipe(recipe_path, [BASE]))
    same = [*sglang, "serve.variant=small", "serve.hardware=h100", "dump.args.max_num_seqs=2"]
    assert engine_settings(load_recipe(recipe_path, [BASE, *same])) == plain
    assert engine_settings(load_recipe(recipe_path, [BASE, "dump.args.kv-cache-dtype=fp8"])) != plain

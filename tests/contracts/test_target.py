"""Claims about what is read of a target: layer conventions, nested configs, fingerprints, norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from contracts.errors import UserError
from contracts.target import Target, default_dflash_layers, to_vllm_layer_ids
from contracts.target_weights import read_head


@pytest.mark.parametrize(
    ("num_layers", "num_captured", "expected"),
    [(60, 5, [1, 15, 29, 43, 57]), (60, 6, [1, 12, 23, 35, 46, 57]), (36, 1, [18])],
)
def test_default_layers_are_those_published(num_layers: int, num_captured: int, expected: list[int]) -> None:
    assert default_dflash_layers(num_layers, num_captured) == expected


def test_vllm_counts_the_embeddings_and_names_the_final_state_last() -> None:
    assert to_vllm_layer_ids([1, 3, 6], num_layers=8) == [2, 4, 7, 8]


@pytest.mark.parametrize("layer_ids", [[3, 1], [1, 1], [-1, 2], [1, 7]])
def test_layer_ids_that_vllm_would_reorder_or_merge_are_refused(layer_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="sorted, unique"):
        to_vllm_layer_ids(layer_ids, num_layers=8)


def write_target(folder: Path, config: dict[str, object], prefix: str = "", seed: int = 0) -> Target:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{prefix}model.embed_tokens.weight": torch.randn(16, 4, generator=generator),
        f"{prefix}lm_head.weight": torch.randn(16, 4, generator=generator),
        f"{prefix}model.norm.weight": torch.rand(4, generator=generator),
    }
    save_file(tensors, folder / "model.safetensors")
    return Target.read(folder)


def test_a_nested_text_config_and_a_prefix_are_found(tmp_path: Path) -> None:
    nested = {"model_type": "outer", "text_config": {"hidden_size": 4, "num_hidden_layers": 6, "use_gemma_norm": True}}
    target = write_target(tmp_path, nested, prefix="language_model.")
    assert (target.hidden_size, target.num_layers, target.final_norm) == (4, 6, "gemma")
    assert read_head(target).embedding.shape == (16, 4)


def test_a_gemma_norm_multiplies_by_one_plus_the_weight(tmp_path: Path) -> None:
    plain = read_head(write_target(tmp_path / "a", {"hidden_size": 4}))
    gemma = read_head(write_target(tmp_path / "b", {"hidden_size": 4, "use_gemma_norm": True}))
    hidden = torch.randn(3, 4)
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(plain.logits(hidden), (normed * plain.norm) @ plain.lm_head.T)
    torch.testing.assert_close(gemma.logits(hidden), (normed * (1 + gemma.norm)) @ gemma.lm_head.T)


def test_other_weights_have_another_fingerprint_and_a_copy_has_the_same(tmp_path: Path) -> None:
    config: dict[str, object] = {"hidden_size": 4}
    first = write_target(tmp_path / "a", config)
    assert write_target(tmp_path / "copy", config).fingerprint == first.fingerprint
    assert write_target(tmp_path / "other", config, seed=1).fingerprint != first.fingerprint
    assert write_target(tmp_path / "config", {"hidden_size": 4, "x": 1}).fingerprint != first.fingerprint


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: found no such file"):
        Target.read(tmp_path)

"""Claims about what is read of a target: layer conventions, nested configs, fingerprints, norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from common.errors import UserError
from dump.hf import find_layers
from target.head import read_head
from target.layers import spread_layers, to_vllm_layer_ids
from target.target import Target


@pytest.mark.parametrize(
    ("num_layers", "num_captured", "expected"),
    [(60, 5, [1, 15, 29, 43, 57]), (60, 6, [1, 12, 23, 35, 46, 57]), (36, 1, [18])],
)
def test_default_layers_are_those_published(num_layers: int, num_captured: int, expected: list[int]) -> None:
    assert spread_layers(num_layers, num_captured) == expected


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


def test_what_a_checkpoint_leaves_out_is_the_default_of_its_type(tmp_path: Path) -> None:
    """The config of Gemma 3 with a vision part, as Google published it: the text part says only what differs."""
    said = {"model_type": "gemma3_text", "hidden_size": 4, "num_hidden_layers": 6, "sliding_window": 1024}
    target = write_target(tmp_path, {"model_type": "gemma3", "text_config": said}, prefix="language_model.")
    assert (target.vocab_size, target.rope_theta, target.is_tied) == (262208, 1_000_000.0, True)
    with pytest.raises(UserError, match="found vocab_size = None"):
        write_target(tmp_path / "other", {"model_type": "other"}).get("vocab_size")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 500000.0}, 500000.0),
        ({"rope_parameters": {"rope_theta": 150000.0}, "rope_theta": 1.0}, 150000.0),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}}, 1e6),
        ({"model_type": "minimax_m3_vl_text"}, 5e6),
        ({}, 10000.0),
    ],
)
def test_the_ropes_base_is_that_of_full_attention(tmp_path: Path, config: dict[str, object], expected: float) -> None:
    assert write_target(tmp_path, config).rope_theta == expected


def test_a_gemma_norm_multiplies_by_one_plus_the_weight(tmp_path: Path) -> None:
    plain = read_head(write_target(tmp_path / "a", {"hidden_size": 4}))
    gemma = read_head(write_target(tmp_path / "b", {"hidden_size": 4, "use_gemma_norm": True}))
    hidden = torch.randn(3, 4)
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(plain.logits(hidden), (normed * plain.norm) @ plain.lm_head.T)
    torch.testing.assert_close(gemma.logits(hidden), (normed * (1 + gemma.norm)) @ gemma.lm_head.T)


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("Starcoder2", {}),
        ("StableLm", {}),
        ("Cohere", {}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Gemma4Text", {"final_logit_softcapping": 2.0, "global_head_dim": 8, "hidden_size_per_layer_input": 0}),
        ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
        ("GPTNeoX", {}),
        ("HyperCLOVAX", {"logits_scaling": 0.25}),
        ("MiniCPM3", {"dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                      "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}),
    ],
)  # fmt: skip
def test_logits_from_the_final_state_are_those_of_transformers(
    family: str, own: dict[str, object], tmp_path: Path
) -> None:
    """LayerNorms with and without bias, scaled and capped logits, tied and untied heads."""
    sizes: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "dtype": "float32",
    }  # fmt: skip
    config = getattr(transformers, family + "Config")(**{**sizes, **own})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(tmp_path)
    target = Target.read(tmp_path)
    kept = []
    find_layers(model, target)[1].register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        expected = model(input_ids=torch.arange(12)[None]).logits
        torch.testing.assert_close(read_head(target).logits(kept[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_hub_name_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub/models--org--model/snapshots/abc"
    expected = write_target(snapshot, {"hidden_size": 4})
    (tmp_path / "hub/models--org--model/refs").mkdir()
    (tmp_path / "hub/models--org--model/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = Target.read(Path("org/model"))
    assert (found.path, found.fingerprint) == (snapshot, expected.fingerprint)
    with pytest.raises(UserError, match="org/other"):
        Target.read(Path("org/other"))


def test_other_weights_have_another_fingerprint_and_a_copy_has_the_same(tmp_path: Path) -> None:
    config: dict[str, object] = {"hidden_size": 4}
    first = write_target(tmp_path / "a", config)
    assert write_target(tmp_path / "copy", config).fingerprint == first.fingerprint
    assert write_target(tmp_path / "other", config, seed=1).fingerprint != first.fingerprint
    assert write_target(tmp_path / "config", {"hidden_size": 4, "x": 1}).fingerprint != first.fingerprint


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: found no such file"):
        Target.read(tmp_path)

"""Claims about heads: quantized ones are read with their scales or refused by name; only a config ties a lm_head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from target.head import find_logit_scale, read_head
from target.target import Target

V, H = 300, 192  # neither a multiple of 128
EMBEDDING = torch.randn(V, H, generator=torch.Generator().manual_seed(0))
HEAD = torch.randn(V, H, generator=torch.Generator().manual_seed(1))

Tensors = dict[str, torch.Tensor]


def write(folder: Path, lm_head: Tensors, embedding: Tensors | None = None, **config: Any) -> Target:
    """A target whose lm_head and embedding have these tensors, by the rest of their names."""
    embedding = {"weight": EMBEDDING} if embedding is None else embedding
    tensors = {f"lm_head.{name}": tensor for name, tensor in lm_head.items()}
    tensors |= {f"model.embed_tokens.{name}": tensor for name, tensor in embedding.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors |= {"model.norm.weight": torch.ones(H)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": H, "model_type": "qwen3", **config}))
    return Target.read(folder)


def repeat(scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A scale for every weight."""
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:V, :H]


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5


FP8 = HEAD.to(torch.float8_e4m3fn)
EXPONENTS = torch.randint(120, 132, (V, H // 32), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_weights_are_read_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    head = read_head(write(tmp_path, {"weight": HEAD.to(dtype)}, {"weight": EMBEDDING.to(dtype)}))
    assert torch.equal(head.lm_head, HEAD.to(dtype).float())
    assert torch.equal(head.embedding, EMBEDDING.to(dtype).float())


@pytest.mark.parametrize(
    ("name", "scale", "block", "config"),
    [
        ("weight_scale", positive(), (V, H), {}),
        ("weight_scale", positive(1), (V, H), {}),
        ("weight_scale", positive(V).bfloat16(), (1, H), {}),
        ("weight_scale", positive(V, 1), (1, H), {}),
        ("weight_scale_inv", positive(3, 2), (128, 128), {}),
        ("weight_scale_inv", positive(V, 2), (1, 128), {}),
        ("weight_scale_inv", positive(5, 3), (64, 64), {"weight_block_size": [64, 64]}),
        ("weight_scale", positive(5, 3), (64, 64),
         {"config_groups": {"group_0": {"weights": {"block_structure": [64, 64]}}}}),
        ("weight_scale_inv", EXPONENTS, (1, 32), {}),
        ("weight_scale", EXPONENTS.view(torch.float8_e8m0fnu), (1, 32), {}),
    ],
)  # fmt: skip
def test_an_fp8_weight_is_multiplied_by_its_scales(
    tmp_path: Path, name: str, scale: torch.Tensor, block: tuple[int, int], config: dict[str, Any]
) -> None:
    parts = {"weight": FP8, name: scale, "input_scale": torch.ones(1)}
    head = read_head(write(tmp_path, parts, parts, quantization_config=config))
    factors = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    factors = factors[:, None] if factors.dim() == 1 else factors
    expected = FP8.float() * (repeat(factors, block) if factors.numel() > 1 else factors.view(()))
    assert torch.equal(head.lm_head, expected)
    assert torch.equal(head.embedding, expected)


def test_nvfp4_of_both_makers_is_what_compressed_tensors_unpacks(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    packed = torch.randint(0, 256, (V, H // 2), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    scale, of_tensor = (8 * positive(V, H // 16)).to(torch.float8_e4m3fn), torch.tensor(0.25)
    unpacked = helpers.unpack_fp4_from_uint8(packed, V, H, dtype=torch.float32)
    expected = unpacked * repeat(scale.float(), (1, 16)) * of_tensor
    modelopt = {"weight": packed, "weight_scale": scale, "weight_scale_2": of_tensor}
    assert torch.equal(read_head(write(tmp_path / "a", modelopt)).lm_head, expected)
    theirs = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": 1 / of_tensor.view(1)}
    assert torch.equal(read_head(write(tmp_path / "b", theirs)).lm_head, expected)


COMPRESSED = {
    "float-quantized": ({"num_bits": 8, "strategy": "channel"}, (256, 1)),
    "block": ({"num_bits": 8, "strategy": "block", "block_structure": [128, 64]}, (2, 3)),
    "nvfp4-pack-quantized": (
        {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
        (256, H // 16),
    ),
    "mxfp8-quantized": (
        {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        (256, H // 32),
    ),
}


@pytest.mark.parametrize("layout", COMPRESSED)
def test_what_compressed_tensors_wrote_is_read_as_it_reads_it(tmp_path: Path, layout: str) -> None:
    """At 256 rows: it reads blocks as if they divided the weight evenly."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args, shape = COMPRESSED[layout]
    weights = quantization.QuantizationArgs(type="float", symmetric=True, **args)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    scale = positive(*shape)
    state = {"weight": HEAD[:256], "weight_scale": scale / 4}
    if layout.startswith("nvfp4"):
        scales = (8 * scale).to(torch.float8_e4m3fn).float()
        state |= {"weight_scale": scales, "weight_global_scale": torch.tensor([16.0])}
    elif layout.startswith("mxfp8"):
        state |= {"weight_scale": torch.exp2((8 * scale).round() - 12)}
    name = "float-quantized" if layout == "block" else layout
    compressor = compressors.BaseCompressor.get_value_from_registry(name)
    written = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(written), scheme)["weight"].float()
    config = {"config_groups": {"group_0": {"weights": {"block_structure": args.get("block_structure")}}}}
    stored = {key: value.detach() for key, value in written.items()}
    found = read_head(write(tmp_path, stored, quantization_config=config)).lm_head
    assert found.unique().numel() > 100
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)  # theirs rounds to bf16


INT32, UINT8 = torch.zeros(V, 24, dtype=torch.int32), torch.zeros(V, H // 2, dtype=torch.uint8)
REFUSED: list[tuple[str, Tensors, dict[str, Any]]] = [
    ("fp8 weight", {"weight": FP8}, {}),
    ("fp8 weight", {"weight": FP8, "weight_scale": positive(), "weight_zero_point": positive()}, {}),
    ("scales [7, 2] of a weight [300, 192]", {"weight": FP8, "weight_scale": positive(7, 2)}, {}),
    ("a scale in int32", {"weight": FP8, "weight_scale": INT32[0, :1]}, {}),
    ("NVFP4 weights with scales [300, 6]",
     {"weight": UINT8, "weight_scale": positive(V, 6).to(FP8.dtype), "weight_scale_2": positive()}, {}),
    ("quantized weights (weight uint8, weight_scale uint8)", {"weight": UINT8, "weight_scale": UINT8}, {}),
    ("compressed-tensors packed integer",
     {"weight_packed": INT32, "weight_shape": torch.tensor([V, H]), "weight_scale": positive(V, 1)}, {}),
    ("GPTQ", {"qweight": INT32, "qzeros": INT32, "scales": positive(V, 1), "g_idx": INT32}, {}),
    ("AWQ", {"qweight": INT32, "qzeros": INT32, "scales": positive(V, 1)}, {"quant_method": "awq"}),
    ("bitsandbytes 4-bit",
     {"weight": UINT8, "weight.absmax": UINT8, "weight.quant_state.bitsandbytes__nf4": UINT8}, {}),
    ("bitsandbytes 8-bit", {"weight": HEAD.to(torch.int8), "SCB": positive(V)}, {}),
    ("MLX", {"weight": INT32.view(torch.uint32), "scales": positive(V, 3), "biases": positive(V, 3)}, {}),
    ("quantized weights (weight int8)", {"weight": HEAD.to(torch.int8)}, {}),
    ("torchao-quantized", {"weight": HEAD, "weight_scale": positive(V)}, {"quant_method": "torchao"}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "parts", "config"), REFUSED)
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_what_is_not_read_exactly_is_refused_by_name(
    tmp_path: Path, module: str, reason: str, parts: Tensors, config: dict[str, Any]
) -> None:
    plain = {"weight": HEAD}
    given = (parts, plain) if module == "lm_head" else (plain, parts)
    with pytest.raises(UserError) as raised:
        read_head(write(tmp_path, *given, quantization_config=config))
    assert reason in str(raised.value)
    assert f"{tmp_path}: {module}" in str(raised.value)
    assert "target.path" in str(raised.value)


TIED_BY = [
    {"tie_word_embeddings": True},
    {"text_config": {"tie_word_embeddings": True}},
    {"tie_word_embeddings": True, "text_config": {"hidden_size": H, "tie_word_embeddings": False}},
    {"model_type": "gemma3_text"},
    {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
]
UNTIED_BY = [
    {},
    {"tie_word_embeddings": False},
    {"model_type": "gemma3_text", "tie_word_embeddings": False},
    {"model_type": "of_another_maker"},
    {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
]


@pytest.mark.parametrize("config", TIED_BY)
def test_a_missing_lm_head_is_the_embedding_where_the_config_or_its_default_says_so(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    head = read_head(write(tmp_path, {}, **config))
    assert head.lm_head is head.embedding


@pytest.mark.parametrize("config", UNTIED_BY)
def test_a_missing_lm_head_is_refused_where_the_config_does_not_tie_it(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no lm_head or embed_out.*tie_word_embeddings: true"):
        read_head(write(tmp_path, {}, **config))


@pytest.mark.parametrize("config", [*TIED_BY, *UNTIED_BY])
def test_a_weight_of_the_checkpoint_is_used_whatever_the_config_says(tmp_path: Path, config: dict[str, Any]) -> None:
    assert torch.equal(read_head(write(tmp_path / "own", {"weight": HEAD}, **config)).lm_head, HEAD)
    copied = read_head(write(tmp_path / "copy", {"weight": EMBEDDING}, **config))
    assert copied.lm_head is copied.embedding


def test_the_names_of_a_vision_language_model_are_found(tmp_path: Path) -> None:
    target = write(tmp_path, {}, tie_word_embeddings=True)
    tensors = {"embed_tokens.weight": EMBEDDING, "norm.weight": torch.ones(H)}
    save_file(
        {f"model.language_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    assert torch.equal(read_head(target).embedding, EMBEDDING)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.0625}, 0.0625),
        ({"logits_scaling": 8.0}, 0.125),
        ({"model_type": "hyperclovax", "logits_scaling": 0.5}, 0.5),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"output_multiplier": 0.25}, 0.25),
        ({"hidden_size": 1024, "dim_model_base": 256, "scale_emb": 12}, 0.25),
        ({"embedding_multiplier": 12.0}, 1.0),
    ],
)
def test_the_factor_of_the_logits_follows_from_the_config(config: dict[str, Any], expected: float) -> None:
    assert find_logit_scale(config) == expected

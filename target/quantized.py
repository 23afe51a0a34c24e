"""Turn a module's stored tensors into its weight in fp32, or refuse the format by name.

| format | tensors of the module | weight |
|---|---|---|
| plain | `weight` in fp32, bf16 or fp16 | as stored |
| fp8 (compressed-tensors, ModelOpt) | `weight`, `weight_scale` of the tensor or of each row | weight * scale |
| fp8 in blocks (DeepSeek) | `weight`, `weight_scale_inv` of blocks of 128 x 128 | weight * scale |
| MXFP8 | `weight` fp8, scales of 32 columns: E8M0 exponents in uint8 | weight * 2^(scale - 127) |
| NVFP4 (ModelOpt) | `weight` uint8, `weight_scale` of 16 columns, `weight_scale_2` | E2M1 * scale * scale_2 |
| NVFP4 (compressed-tensors) | `weight_packed`, `weight_scale`, `weight_global_scale` | E2M1 * scale / global_scale |

An engine may also quantize the head's inputs; that is not reproduced here. Sources: vLLM 0.32,
`model_executor/layers/quantization/` (fp8.py, modelopt.py); compressed-tensors 0.17, `compressors/nvfp4`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from common.errors import UserError

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCKS = ((128, 128), (1, 128), (1, 32))
"""Blocks that share a scale, in rows and columns, where the config names none."""

NVFP4_GROUP = 16
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of a 4-bit float by its three low bits; the fourth is the sign."""

ROWS = 4096
"""Rows dequantized at a time: a head has gigabytes in fp32, and temporaries should not."""

Parts = Mapping[str, torch.Tensor]


def weight_of(parts: Parts, config: Mapping[str, Any], where: object) -> torch.Tensor:
    """Return the weight of a module in fp32. `parts`: its tensors by the rest of their names, biases left out.

    `config` is the target's, `where` the module for errors. Raises UserError for a format that is not in the table.
    """
    weight, stored = parts.get("weight"), {name for name in parts if not name.startswith(("input_", "output_"))}
    if weight is not None and stored == {"weight"} and weight.dtype in PLAIN:
        return weight.float()
    if weight is not None and weight.dtype in FP8:
        if stored in ({"weight", "weight_scale"}, {"weight", "weight_scale_inv"}):
            (name,) = stored - {"weight"}
            return _from_fp8(weight, parts[name], _block_of(config), f"{where}.{name}")
        raise refusal(where, parts, "an fp8 weight", "its scale alone beside it (weight_scale or weight_scale_inv)")
    if stored == {"weight", "weight_scale", "weight_scale_2"} and parts["weight_scale"].dtype in FP8:
        return _from_nvfp4(parts["weight"], parts["weight_scale"], parts["weight_scale_2"].float(), where, parts)
    if stored == {"weight_packed", "weight_scale", "weight_global_scale"} and parts["weight_scale"].dtype in FP8:
        scale = 1.0 / parts["weight_global_scale"].float()
        return _from_nvfp4(parts["weight_packed"], parts["weight_scale"], scale, where, parts)
    raise refusal(where, parts, f"{_name_of(parts, config)} weights", "a plain, fp8, MXFP8 or NVFP4 weight")


def refusal(where: object, parts: Parts, found: str, expected: str) -> UserError:
    """Return the error for a module whose tensors are not understood."""
    tensors = ", ".join(f"{name} {str(part.dtype).removeprefix('torch.')}" for name, part in sorted(parts.items()))
    return UserError(
        where,
        found=f"{found} ({tensors})",
        expected=expected,
        fix="Set target.path to the unquantized checkpoint; list the quantized one in serve.variants to serve it.",
    )


def _name_of(parts: Parts, config: Mapping[str, Any]) -> str:
    """Return the name of a format that is not read."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if "qweight" in parts:
        return {"gptq": "GPTQ", "awq": "AWQ"}.get(str(method), "GPTQ" if "g_idx" in parts else "GPTQ or AWQ")
    if "SCB" in parts:
        return "bitsandbytes 8-bit"
    if any(name.startswith(("weight.absmax", "weight.quant_state")) for name in parts):
        return "bitsandbytes 4-bit"
    if "weight_packed" in parts:
        return "compressed-tensors packed integer" if "weight_shape" in parts else "compressed-tensors packed"
    if {"scales", "biases"} <= {*parts}:
        return "MLX"
    return f"{method}-quantized" if method else "quantized"


def _from_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, where: object) -> torch.Tensor:
    """Return `weight (V, H)` times the scale of the tensor, of each row or of each block."""
    values = _scale_values(scale, where)
    if values.numel() == 1:
        return weight.float() * values.view(())
    height, width = weight.shape
    values = values[:, None] if values.dim() == 1 else values
    blocks = [(1, width), *([block] if block else BLOCKS)]
    fitting = [(a, b) for a, b in blocks if values.shape == (-(-height // a), -(-width // b))]
    if not fitting:
        raise UserError(
            where,
            found=f"scales {list(scale.shape)} of a weight {[height, width]}",
            expected=f"one, one for each row, or one for each block of {' or '.join(map(str, blocks[1:]))}",
            fix="Check quantization_config.weight_block_size, or set target.path to the unquantized checkpoint.",
        )
    rows, columns = fitting[0]
    scale_of = torch.arange(height) // rows

    def scaled(part: slice) -> torch.Tensor:
        return weight[part].float() * values[scale_of[part]].repeat_interleave(columns, dim=1)[:, :width]

    return _by_rows(height, width, scaled)


def _scale_values(scale: torch.Tensor, where: object) -> torch.Tensor:
    """Return a scale in fp32; uint8 holds the exponents of E8M0, biased by 127."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127.0)
    if scale.dtype in (*PLAIN, torch.float8_e8m0fnu):
        return scale.float()
    raise UserError(
        where,
        found=f"a scale in {str(scale.dtype).removeprefix('torch.')}",
        expected="fp32, bf16, fp16 or E8M0",
        fix="Set target.path to the unquantized checkpoint.",
    )


def _from_nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, scale_of_tensor: torch.Tensor, where: object, parts: Parts
) -> torch.Tensor:
    """Return the weight (V, H) of `packed (V, H/2)`, two values a byte, low bits first; scale (V, H/16)."""
    height, width = packed.shape[0], 2 * packed.shape[-1]
    shapes_fit = scale.shape == (height, width // NVFP4_GROUP) and scale_of_tensor.numel() == 1
    if packed.dtype != torch.uint8 or not shapes_fit:
        raise refusal(where, parts, f"NVFP4 weights with scales {list(scale.shape)}", "a scale for every 16 columns")
    table = torch.cat([E2M1, -E2M1])

    def unpacked(part: slice) -> torch.Tensor:
        codes = torch.stack([packed[part] & 15, packed[part] >> 4], dim=-1).flatten(-2).int()
        scales = (scale[part].float() * scale_of_tensor.view(())).repeat_interleave(NVFP4_GROUP, dim=1)
        return table[codes] * scales

    return _by_rows(height, width, unpacked)


def _by_rows(height: int, width: int, rows_of: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    found = torch.empty(height, width)
    for start in range(0, height, ROWS):
        part = slice(start, start + ROWS)
        found[part] = rows_of(part)
    return found


def _block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block of `quantization_config`, as transformers or as compressed-tensors writes it."""
    quantization = config.get("quantization_config") or {}
    groups = (quantization.get("config_groups") or {}).values()
    structures = [(group.get("weights") or {}).get("block_structure") for group in groups if isinstance(group, dict)]
    block = quantization.get("weight_block_size") or next(filter(None, structures), None)
    return (int(block[0]), int(block[1])) if block else None

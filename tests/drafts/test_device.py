"""Claims about a training step on a device: planned on the CPU, it never waits for the device and mixes no devices.

Torch's meta device has shapes and no values: whatever needs a value (`.item()`, boolean masks, printing) fails there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drafts import METHODS
from drafts.batch import Batch
from drafts.chunks import DEVICE_CHUNK_ROWS
from drafts.draft import Draft
from drafts.moving import tensors_of, to_device
from target.head import TargetHead

META = torch.device("meta")
HIDDEN, VOCABULARY, TOKENS, PROMPT = 6144, 200_064, 8192, 512  # MiniMax-M3's; the recipe's length
SHARED = {
    "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_target_layers": 60, "layer_ids": [1, 15, 29, 43, 57],
    "mask_token_id": 200_061, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "max_position_embeddings": 8192, "yarn": None,
    "target_fingerprint": "", "store": "",
}  # fmt: skip
LAYER = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288}
DRAFTS: dict[str, dict[str, Any]] = {
    "dflash": {"method": "dflash", "block_size": 8, "num_layers": 5, "num_anchors": 512, **LAYER},
    "dflash-decay-distill": {
        "method": "dflash", "num_layers": 5, "slot_weights": "decay", "objective": "distill", **LAYER,
    },
    "dspark": {"method": "dspark", "num_layers": 6, "num_anchors": 256, **LAYER},
    "dspark-fill-in-lk-dpace": {
        "method": "dspark", "num_layers": 2, "sample_from_anchor": False, "objective": "lk_hybrid",
        "slot_weights": "dpace", **LAYER,
    },
    "eagle3": {"method": "eagle3", "ttt_length": 7, **LAYER},
    "eagle3-vocabulary-distill": {
        "method": "eagle3", "ttt_length": 3, "draft_vocab_size": 32_000, "objective": "distill", **LAYER,
    },
    "dflash2": {"method": "dflash2", "num_layers": 2, **LAYER},
    "lilicorr": {"method": "lilicorr", "num_layers": 2, "conv_kernel_size": 2, "conv_group_size": 16, **LAYER},
    "peagle": {"method": "peagle", "num_layers": 2, **LAYER},
}  # fmt: skip


class OneDevice(TorchDispatchMode):
    """Fails on an operation with tensors of more than one device; counts those that make logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = 0
        self.head_casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}  # CPU scalars are arguments, not data
        assert devices <= {"meta"} or func is torch.ops.aten._to_copy.default, (func, devices)
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.shape[-1:] == (VOCABULARY,)
            and func is torch.ops.aten.mm.default
        ):
            self.logits += 1
            assert result.shape[0] < DEVICE_CHUNK_ROWS + 8  # a chunk ends with a block
        if func is torch.ops.aten._to_copy.default and tensors[0].numel() == VOCABULARY * HIDDEN:
            self.head_casts += 1
        return result


@pytest.fixture(params=DRAFTS)
def draft(request: pytest.FixtureRequest) -> Draft:
    values = DRAFTS[request.param]
    method = METHODS[values["method"]]
    section = method.section.model_validate(values)
    with META:
        draft = method.build(method.make_config(section, SHARED), section, gradient_checkpointing=True)
    draft.to(torch.bfloat16).train().suppose_values()  # bf16 as under autocast, which meta tensors do not know
    return draft


@pytest.fixture
def head() -> TargetHead:
    rows = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=META)
    other = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=META)
    return TargetHead(rows, other, torch.empty(HIDDEN, device=META), "gemma", 1e-6)


@pytest.fixture
def batch() -> Batch:
    states = torch.empty(TOKENS, 6 * HIDDEN, dtype=torch.bfloat16, device=META)
    return Batch(
        token_ids=torch.arange(TOKENS) % 1000,
        loss_mask=torch.arange(TOKENS) % 4096 >= PROMPT,
        aux_hidden_states=states[:, HIDDEN:],
        hidden_states=states[:, :HIDDEN],
        lengths=[4096, 4096],
        sample_ids=["a", "b"],
        seeds=[1, 2],
    )


def test_a_step_at_minimax_m3s_size_runs_without_values_on_one_device(
    draft: Draft, head: TargetHead, batch: Batch
) -> None:
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-3)
    before = {name: tensor.device for name, tensor in vars(batch).items() if isinstance(tensor, torch.Tensor)}
    plan = draft.plan(batch)
    assert before["token_ids"].type == "cpu"
    batch, plan = to_device((batch, plan), META)
    with OneDevice() as mode:
        result = draft(batch, plan, head)
        (result.loss_sum * (1 / plan.num_slots)).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        counts = result.counts()
    assert counts.device.type == "meta"
    assert all(parameter.grad is not None for parameter in draft.parameters())
    assert plan.num_slots > 2 * 512
    assert mode.head_casts == 0
    if getattr(draft, "lm_head", None) is None:
        is_dspark = draft.config.method == "dspark"
        chunks = -(-plan.num_slots // (DEVICE_CHUNK_ROWS // (1 + is_dspark)))
        products = 1 + draft.section.needs_final_states + is_dspark  # type: ignore[attr-defined]
        assert mode.logits <= products * (chunks + 1)


def test_planning_waits_for_no_device(draft: Draft, batch: Batch) -> None:

    def on_cpu(value: Any) -> bool:
        return all(leaf.device.type == "cpu" for leaf in tensors_of(value))

    assert on_cpu(draft.plan(batch))

"""Compute the parts of exported DFlash2 and LiLiCorr drafts with vLLM's own modules.

Prints the names of those parts whose modules take every exported tensor and give what ours give. Run as a process of
its own, since vLLM's modules need its process groups.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # tests/block_reference.py

import torch
from block_reference import DIMS, HIDDEN, SHARED, VOCABULARY, spread
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel

from drafts import METHODS
from drafts.convolution import BlockConvolution
from drafts.dflash2.model import CandidateSelector
from drafts.lilicorr.head import Lattice, LiLiCorrHead
from drafts.method import ExportFacts

FACTS = ExportFacts(dtype="float32", target="t", architectures=["X"], bos_token_id=None, eos_token_id=1)
BLOCKS, SLOTS, TOP_K = 3, 3, 4
KEYS: dict[str, dict[str, Any]] = {
    "dflash2": {"conv_group_size": 4, "selector_rank": 5, "selector_top_k": TOP_K},
    "lilicorr": {
        "lilicorr_candidate_topk": TOP_K, "lilicorr_hidden_size": 12, "lilicorr_num_heads": 2,
        "lilicorr_factor_dim": 6, "lilicorr_mlp_ratio": 1.5,
    },
}  # fmt: skip


def exported(name: str) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Return a draft with random weights, its config.json and its tensors."""
    method = METHODS[name]
    section = method.section.model_validate({"method": name, **DIMS, "block_size": SLOTS + 1, **KEYS[name]})
    config = method.make_config(section, SHARED)
    draft = method.build(config, section).eval()
    spread(draft)
    return draft, *method.export(config, draft.state_dict(), "native", FACTS)


def load(theirs: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Load the tensors below a prefix with vLLM's loader; they must be all that the module has."""
    from vllm.model_executor.models.utils import AutoWeightsLoader

    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert own.keys() == dict(theirs.named_parameters()).keys()
    assert AutoWeightsLoader(theirs).load_weights(own.items()) == own.keys()


def finish_loading(theirs: nn.Module) -> None:
    """Prepare the linear layers as vLLM's engine does."""
    for module in theirs.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


def convolution() -> None:
    from vllm.model_executor.models.qwen3_dflash2 import DFlashGroupedConv

    draft, config, tensors = exported("dflash2")
    inner = config["dflash_config"]
    sizes = HIDDEN, inner["conv_kernel_size"], inner["conv_group_size"]
    theirs = DFlashGroupedConv(*sizes, block_size=config["block_size"], params_dtype=torch.float32, prefix="")
    load(theirs, tensors, "layers.1.mlp_conv.")
    finish_loading(theirs)
    ours = draft.layers[1].mlp_conv
    assert isinstance(ours, BlockConvolution)
    x, z = torch.randn(2, BLOCKS, SLOTS + 1, HIDDEN)
    before, dynamic = ours.before(x)
    their_before, their_dynamic = theirs.prepare(x.flatten(0, 1))
    torch.testing.assert_close(their_before.view_as(x), before)
    torch.testing.assert_close(theirs.finish(z.flatten(0, 1), their_dynamic).view_as(z), ours.after(z, dynamic))


def selector() -> None:
    from vllm.model_executor.models import qwen3_dflash2

    draft, config, tensors = exported("dflash2")
    inner = config["dflash_config"]
    sizes = HIDDEN, VOCABULARY, inner["selector_rank"], inner["selector_top_k"]
    theirs = qwen3_dflash2.CandidateSelector(*sizes, params_dtype=torch.float32, prefix="")
    load(theirs, tensors, "candidate_selector.")
    finish_loading(theirs)
    ours = draft.candidate_selector
    assert isinstance(ours, CandidateSelector)
    hidden, logits = torch.randn(BLOCKS, SLOTS, HIDDEN), torch.randn(BLOCKS, SLOTS, TOP_K)
    tokens, anchors = torch.randint(0, VOCABULARY, (BLOCKS, SLOTS, TOP_K)), torch.tensor([1, 2, 3])
    found = logits[:, :, None] + ours.edges(hidden, anchors, tokens)
    torch.testing.assert_close(theirs.forward(tokens, logits, hidden, anchors), found)


def lattice() -> None:
    from vllm.model_executor.models import lilicorr

    draft, config, tensors = exported("lilicorr")
    theirs = lilicorr.LiLiCorrHead(
        model_hidden_size=HIDDEN,
        block_size=config["dflash_config"]["block_size"],
        rms_norm_eps=config["rms_norm_eps"],
        config=config["dflash_config"],
    )
    load(theirs, tensors, "lilicorr.")
    theirs.materialize_inference_buffers(torch.device("cpu"), torch.float32)
    finish_loading(theirs)
    assert isinstance(draft.lilicorr, LiLiCorrHead)
    log_probs = torch.randn(BLOCKS, SLOTS, 20).log_softmax(-1).topk(TOP_K).values
    embeddings, hidden = torch.randn(BLOCKS, SLOTS, TOP_K, HIDDEN), torch.randn(BLOCKS, SLOTS, HIDDEN)
    has_context = torch.tensor([True, False, True])
    context = torch.randn(BLOCKS, HIDDEN)
    found = draft.lilicorr(Lattice(embeddings, log_probs, hidden, context, has_context))
    expected = theirs.forward(embeddings, log_probs, hidden, context, has_context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def main() -> None:
    torch.manual_seed(0)
    with TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
        for part in (convolution, selector, lattice):
            part()
            print(f"{part.__name__}: equal")


if __name__ == "__main__":
    main()

"""Start a vLLM engine in this process and provoke one of the CPU failures: `engine_probe.py CASE TARGET FOLDER`.

Prints "fine" when nothing failed. Run as a process of its own, as a dead engine takes its process along.
"""

from __future__ import annotations

import sys
from typing import Any


def seeded_request_in_chunks(target: str, folder: str) -> None:
    llm, sampling = make_llm(target, max_num_batched_tokens=64, max_num_seqs=4, enable_chunked_prefill=True)
    prompts = [{"prompt_token_ids": list(range(10, 200))} for _ in range(3)]
    llm.generate(prompts, sampling(temperature=1.0, seed=7, max_tokens=4), use_tqdm=False)


def sampling_parameters_a_token(target: str, folder: str) -> None:
    import torch
    import vllm._C  # noqa: F401 (the CPU kernels)
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    if current_platform.register_triton_kernel_overrides:  # as the CPU worker does
        current_platform.register_triton_kernel_overrides()
    else:  # vLLM 0.30
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        CPUModelRunner._postprocess_triton(None)
    load_general_plugins()
    from vllm.v1.sample import rejection_sampler

    values = torch.tensor([0.5, 0.0, 0.25])
    ends = torch.tensor([2, 3, 7], dtype=torch.int32)
    spread = rejection_sampler.expand_batch_to_tokens(values, ends, 7, replace_from=0, replace_to=1)
    expected = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25])
    assert torch.equal(spread, expected), f"sampling parameters are garbage: {spread.tolist()}"


def top_k_without_rows(target: str, folder: str) -> None:
    import torch
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.v1.sample.ops import topk_topp_sampler

    logits = topk_topp_sampler.apply_top_k_only(torch.empty(0, 50), torch.empty(0, dtype=torch.int64))
    assert logits.shape == (0, 50)


def a_norm_for_each_layer(target: str, folder: str) -> None:
    """Norm keys as DFlash does, (layers, tokens, heads, size), with a weight for each layer."""
    import torch
    import vllm._C  # noqa: F401 (the CPU kernels)
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm import _custom_ops

    keys, weight = torch.randn(2, 5, 2, 32), torch.rand(2, 32) + 0.5
    out = torch.empty_like(keys)
    _custom_ops.rms_norm(out, keys, weight, 1e-6)
    for layer in range(2):
        expected = torch.nn.functional.rms_norm(keys[layer], (32,), weight[layer], 1e-6)
        assert torch.allclose(out[layer], expected, atol=1e-5), f"layer {layer} has another layer's weight"


def draft_kernels(target: str, folder: str) -> None:
    import torch
    import vllm._C  # noqa: F401 (the CPU kernels)
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.v1.spec_decode.utils import eagle_step_update_slot_mapping_and_metadata

    positions, slots, lengths = torch.tensor([17]), torch.zeros(1, dtype=torch.int64), torch.tensor([18]).int()
    blocks = torch.tensor([[5, 7]], dtype=torch.int32)
    eagle_step_update_slot_mapping_and_metadata(positions, blocks, lengths, 16, 256, positions, slots)
    assert (positions.item(), slots.item(), lengths.item()) == (18, 7 * 16 + 2, 19)


def stock_connector(target: str, folder: str) -> None:
    capture(target, folder, {"kv_connector": "ExampleHiddenStatesConnector"})


def our_connector(target: str, folder: str) -> None:
    module = "serve.vllm_cpu.hidden_states_connector"
    capture(target, folder, {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": module})


def gpu_connector(target: str, folder: str) -> None:
    """The connector of GPUs, under the V2 runner: vLLM replaces CUDA's streams and events there, but for two things."""
    from pathlib import Path

    import torch
    from safetensors.torch import load_file
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import load_hidden_states
    from vllm.v1.worker.cpu import shm

    from contracts.rank_states import PREFLIGHT, find_rank_files

    empty_like = torch.empty_like
    torch.empty_like = lambda *args, pin_memory=False, **kwargs: empty_like(*args, **kwargs)
    shm._EventPlaceholder.query = lambda self: True
    module = "serve.vllm_plugins.hidden_states_connector"
    engine = capture(target, folder, {"kv_connector": "HiddenStatesConnector", "kv_connector_module_path": module})
    from vllm import SamplingParams

    for name in (f"{PREFLIGHT}-0", "other", "flush"):
        engine.add_request(name, {"prompt_token_ids": list(range(10, 60))}, SamplingParams(max_tokens=1))
        while engine.has_unfinished_requests():
            engine.step()
    marked, other = (next(Path(folder).glob(f"{name}*.lock")).with_suffix("") for name in (f"{PREFLIGHT}-0", "other"))
    expected = load_hidden_states(str(marked))["hidden_states"]  # waits for the thread that writes the file
    assert expected.shape == (50, 2, 64)
    ranks, (states,) = find_rank_files(marked)
    assert ranks == 1
    assert torch.equal(load_file(states)["hidden_states"], expected)
    assert load_hidden_states(str(other))["hidden_states"].shape == (50, 2, 64)
    assert find_rank_files(other) == (0, [])


def capture(target: str, folder: str, connector: dict[str, Any]) -> Any:
    llm, sampling = make_llm(
        target,
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1, 5]}},
        },
        kv_transfer_config={
            **connector,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": folder},
        },
    )
    for _ in range(2):
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling(max_tokens=1), use_tqdm=False)
    return llm.llm_engine


def make_llm(target: str, **arguments: Any) -> Any:
    import os

    from serve.engine import engine_env

    os.environ.update(engine_env({}))
    from vllm import LLM, SamplingParams

    llm = LLM(model=target, dtype="float32", enforce_eager=True, max_model_len=256, **arguments)
    return llm, SamplingParams


if __name__ == "__main__":
    case, target, folder = sys.argv[1:]
    globals()[case](target, folder)
    print("fine")

"""A vLLM plugin for tests: each worker appends a JSON line to the file VLLM_REPORT about what runs in it.

`runner`: the class of the model runner; `mends`: the fixes of serve/vllm_cpu and the changes to Triton in its process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def register() -> None:
    path = os.environ.get("VLLM_REPORT")
    if not path:
        return
    from vllm.v1.worker.gpu_worker import Worker

    stock = Worker.load_model
    if getattr(stock, "_reports", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        name = f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}"
        with Path(path).open("a") as file:
            file.write(json.dumps({"runner": name, "mends": find_mends()}) + "\n")

    load_model._reports = True  # type: ignore[attr-defined]
    Worker.load_model = load_model


def find_mends() -> list[str]:
    from triton.language.extra import libdevice
    from triton.runtime import interpreter
    from vllm import _custom_ops
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    known = {
        "keep_seeded_generators_usable": getattr(GPUModelRunner, "_draftline_seed_fix", False),
        "expand_sampling_parameters": rejection_sampler.expand_batch_to_tokens.__module__ == "serve.vllm_cpu",
        "accept_empty_top_k": getattr(topk_topp_sampler.apply_top_k_only, "_draftline_fix", False),
        "norm_each_layer": getattr(_custom_ops.rms_norm, "_draftline_fix", False),
        "triton: arguments not copied": interpreter.GridExecutor._init_args_hst.__module__
        == "triton_interpreter.plugin",
        "triton: scalar masks": interpreter.InterpreterBuilder.create_splat.__module__ == "triton_interpreter.plugin",
        "triton: log1p": libdevice.log1p.__module__ == "triton_interpreter.plugin",
    }
    return [name for name, is_active in known.items() if is_active]

"""Print what each layer of draft configs sees in vLLM, [window, causal]. Configs come as JSON on standard input."""

from __future__ import annotations

import json
import os
import sys

from transformers import Qwen3Config
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models.qwen3_dflash import _resolve_layer_attention
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

runner = VllmConfig()
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # V1 refuses layers of both kinds
found = []
for values in json.load(sys.stdin):
    is_speculators = "speculators_model_type" in values
    known = SpeculatorsConfig.extract_transformers_pre_trained_config(values) if is_speculators else values
    config = Qwen3Config(**known)
    with set_current_vllm_config(runner):
        found.append([_resolve_layer_attention(config, layer) for layer in range(config.num_hidden_layers)])
print(json.dumps(found))

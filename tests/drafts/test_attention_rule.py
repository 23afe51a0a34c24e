"""Claims about what layers see: exports say it as vLLM reads it, and folders of others are read as vLLM reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pydantic import ValidationError

from common.errors import UserError
from drafts import METHODS
from drafts.attention_rule import FULL, SLIDING, AttentionRule
from drafts.block_config import BlockConfig
from drafts.dflash.config import DFlashConfig, DFlashSection
from drafts.method import ExportFacts
from drafts.reading import DraftFolder

SHARED: dict[str, Any] = {
    "hidden_size": 64, "vocab_size": 100, "num_target_layers": 8, "layer_ids": [1, 3], "mask_token_id": 99,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 1024, "yarn": None,
    "target_fingerprint": "", "store": "",
}  # fmt: skip
DIMENSIONS: dict[str, Any] = {
    "num_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96
}  # fmt: skip
FACTS = ExportFacts(dtype="float32", target="t", architectures=["Qwen3ForCausalLM"], bos_token_id=0, eos_token_id=1)
KINDS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"sliding_window": 32},
    {"sliding_window": 32, "is_causal": False},
    {"sliding_window": 32, "layer_types": [SLIDING, SLIDING, FULL]},
    {"sliding_window": 32, "layer_types": [SLIDING, SLIDING, FULL], "is_causal": False},
    {"sliding_window": 32, "layer_types": [FULL, SLIDING, FULL], "is_causal": True},
]
OF_OTHERS: list[dict[str, Any]] = [
    {"use_swa": True, "swa_window_size": 16},  # ModelOpt, with or without `causal`
    {"use_swa": True, "swa_window_size": 16, "causal": False, "layer_types": [FULL] * 3},
    {"use_swa": True, "swa_window_size": 16, "causal": True, "layer_types": [FULL] * 3},
    {"use_swa": True, "swa_window_size": 16, "layer_types": [FULL] * 3},
    {"causal": True, "layer_types": [FULL] * 3},
]
"""Keys of `dflash_config`; `layer_types` at the top level."""


def config_of(kind: dict[str, Any], method: str = "dflash") -> BlockConfig:
    section = METHODS[method].section.model_validate({"method": method, **DIMENSIONS, **kind})
    config = METHODS[method].make_config(section, SHARED)
    assert isinstance(config, BlockConfig)
    return config


def exported(config: BlockConfig, layout: str = "native") -> dict[str, Any]:
    return METHODS[config.method].export(config, {}, layout, FACTS)[0]


def in_vllm(configs: list[dict[str, Any]]) -> list[list[AttentionRule]]:
    probe = [sys.executable, str(ROOT / "tests/drafts/attention_rule_probe.py")]
    result = subprocess.run(probe, input=json.dumps(configs), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    layers: list[list[list[Any]]] = json.loads(result.stdout.splitlines()[-1])
    return [[AttentionRule(causal, window) for window, causal in of_config] for of_config in layers]


@pytest.mark.vllm
@pytest.mark.proves("exports of block drafts")
def test_vllm_reads_each_export_and_each_folder_of_others_as_it_is_read_here() -> None:
    expected, configs = [], []
    for kind in KINDS:
        for method in ("dflash", "dflash2", "dspark"):
            config = config_of(kind, method)
            layouts = ["native"] if len({rule.causal for rule in config.rules}) > 1 else METHODS[method].layouts
            for layout in layouts:
                expected.append(config.rules)
                configs.append(exported(config, layout))
    for inner in OF_OTHERS:
        values = exported(config_of({}))
        for key in ("layer_types", "is_causal", "use_sliding_window"):
            values.pop(key)
        top = {key: inner[key] for key in inner if key == "layer_types"}
        values["dflash_config"] |= {key: inner[key] for key in inner if key not in top}
        configs.append({**values, **top})
        expected.append(read(configs[-1]))
    assert in_vllm(configs) == expected


def read(values: dict[str, Any]) -> list[AttentionRule]:
    import torch

    tensors = {"fc.weight": torch.zeros(64, 128)}
    method = METHODS["dflash"]
    facts = method.read_published(DraftFolder(Path("x"), values, tensors, 8)).facts
    return DFlashConfig.model_validate({**config_of({}).model_dump(), **facts}).rules


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dflash", "dflash2", "dspark", "lilicorr"])
def test_an_export_is_read_back_as_it_was_trained(kind: dict[str, Any], method: str) -> None:
    import torch

    config = config_of(kind, method)
    is_mixed = len({rule.causal for rule in config.rules}) > 1
    for layout in METHODS[method].layouts:
        if layout == "speculators" and method == "dflash" and is_mixed:
            with pytest.raises(UserError, match="layers that are causal in the block, and layers that are not"):
                exported(config, layout)
            continue
        folder = DraftFolder(Path("x"), exported(config, layout), {"fc.weight": torch.zeros(64, 128)}, 8)
        facts = METHODS[method].read_published(folder).facts
        assert type(config).model_validate({**config.model_dump(), **facts}) == config
        assert facts.keys() >= {"layer_types", "sliding_window", "is_causal"}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ({"layer_types": [SLIDING] * 3}, "give both, or neither"),
        ({"sliding_window": 32, "layer_types": [FULL] * 3}, "give both, or neither"),
        ({"sliding_window": 32, "layer_types": [SLIDING]}, "layer_types has 1 entries for num_layers 3"),
        ({"sliding_window": 7}, "sliding_window must hold a block: at least 8"),
        ({"layer_types": ["chunked_attention"] * 3}, "full_attention"),
    ],
)
def test_a_section_whose_layers_could_not_be_served_is_refused(kind: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DFlashSection.model_validate({**DIMENSIONS, **kind})

"""Claims about final norms: what is computed for a family is what the family's own class computes."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from target.final_norm import KIND_BY_MODEL_TYPE, find_final_norm, find_norm_eps
from target.head import TargetHead
from target.section import TargetSection
from target.target import Target

WITH_ANOTHER_RULE = sorted({
    *KIND_BY_MODEL_TYPE, "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "embedding_gemma2",
    "diffusion_gemma", "minimax_m2", "muse_glimmer", "llama", "qwen3",
} & {*transformers.CONFIG_MAPPING.keys()})  # fmt: skip
NAMES = "norm|final_norm|final_layernorm|final_layer_norm|ln_f|norm_f"
WIDTHS = r"config\.hidden_size|self\.hidden_size|self\.embed_dim|config\.text_config\.hidden_size|config\.n_embd"
FINAL_NORM = re.compile(rf"self\.(?:{NAMES}) = (\w+)\(\s*(?:{WIDTHS})\b")


def own_norm(model_type: str) -> tuple[dict[str, Any], torch.nn.Module] | None:
    """The text config of a family and its final norm with random weights; None where no own class makes it."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    names = [name for name in FINAL_NORM.findall(inspect.getsource(module)) if name != "nn"]
    if not names:
        return None
    config = config_class().get_text_config().to_dict()
    norm = getattr(module, names[-1])(16, eps=find_norm_eps(config))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand_like(parameter))
    return config, norm


def check_family(model_type: str) -> bool:
    found = own_norm(model_type)
    if found is None or not hasattr(found[1], "weight"):
        return False
    config, norm = found
    weight, bias = norm.weight.detach(), getattr(norm, "bias", None)
    head = TargetHead(
        weight, weight, weight, find_final_norm(config), find_norm_eps(config), None if bias is None else bias.detach()
    )
    hidden = torch.randn(5, 16) * 3
    torch.testing.assert_close(head.normalize(hidden), norm(hidden).detach(), msg=lambda text: f"{model_type}: {text}")
    return True


@pytest.mark.parametrize("model_type", WITH_ANOTHER_RULE)
def test_the_final_norm_is_the_familys_own(model_type: str) -> None:
    assert check_family(model_type)


@pytest.mark.long
def test_the_final_norm_of_every_causal_model_of_transformers_is_its_own() -> None:
    olmo_takes_no_epsilon, need_parts = {"olmo"}, {"musicgen", "musicgen_melody"}
    families = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - olmo_takes_no_epsilon - need_parts
    assert sum(map(check_family, sorted(families))) > 100


def test_a_family_that_adds_one_to_its_weight_is_in_the_table() -> None:
    """Fails when transformers brings a new one."""
    folder = Path(transformers.__file__).parent / "models"
    adding = {
        path.parent.name for path in folder.glob("*/modeling_*.py")
        if re.search(r"1\.0 \+ self\.weight|self\.weight \+ 1\.0", path.read_text())
    }  # fmt: skip
    encoder_decoders = {"t5gemma", "t5gemma2"}
    other_norms_only = {"muse_glimmer", "qwen4_exp", "videoprism"}  # not the text model's final one
    assert adding - encoder_decoders - other_norms_only <= {*KIND_BY_MODEL_TYPE}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3_next", "rms_norm_eps": 1e-6}, "gemma"),
        ({"model_type": "gemma3n_text", "rms_norm_eps": 1e-6}, "rms"),
        ({"model_type": "gemma3_text", "rms_norm_eps": 1e-6}, "gemma"),
        ({"model_type": "other", "use_gemma_norm": True}, "gemma"),
        ({"model_type": "other", "layer_norm_eps": 1e-5}, "layer"),
        ({"model_type": "nemotron", "norm_eps": 1e-5}, "layer1p"),
        ({}, "rms"),
    ],
)
def test_the_kind_follows_from_the_config(config: dict[str, object], expected: str) -> None:
    assert find_final_norm(config) == expected


def test_a_recipe_overrides_the_norm_alone_and_with_facts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "rms_norm_eps": 1e-6}))
    assert Target.of(TargetSection(path=tmp_path)).final_norm == "rms"
    assert Target.of(TargetSection(path=tmp_path, final_norm="gemma")).final_norm == "gemma"
    facts: Any = {
        "architecture": "A", "hidden_size": 4, "num_hidden_layers": 4, "vocab_size": 9, "rope_theta": 1e4,
        "highest_token_id": 3, "final_norm": "gemma",
    }  # fmt: skip
    absent = tmp_path / "absent"
    assert Target.of(TargetSection(path=absent, facts=facts)).final_norm == "gemma"
    assert Target.of(TargetSection(path=absent, facts=facts, final_norm="layer")).final_norm == "layer"


def test_every_stage_reads_its_target_by_the_recipes_section() -> None:
    """`Target.read` knows nothing of `target.final_norm`."""
    stages = ("synth", "dump", "train", "bench")
    files = [path for stage in stages for path in (ROOT / stage).rglob("*.py")]
    assert [path for path in files if "Target.read(" in path.read_text()] == []

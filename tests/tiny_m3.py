"""A MiniMax-M3 of random weights, small enough for tests: nested config, experts, sparse blocks, Gemma norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_LAYERS, HIDDEN = 6, 64
ROOT = Path(__file__).resolve().parent.parent


def m3_config(vocab_size: int) -> dict[str, Any]:
    """The nested config of a tiny M3, as the hub's config.json has it."""
    sparse = [0, 0, 1, 1, 1, 1]
    text = {
        "model_type": "minimax_m3_text", "architectures": ["MiniMaxM3SparseForCausalLM"],
        "vocab_size": vocab_size, "hidden_size": HIDDEN, "intermediate_size": 32,
        "dense_intermediate_size": 96, "shared_intermediate_size": 32, "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "use_gemma_norm": True, "attention_output_gate": False, "rope_theta": 5000000,
        "rotary_dim": 16, "partial_rotary_factor": 0.5, "hidden_act": "swigluoai", "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0, "use_qk_norm": True, "qk_norm_type": "per_head", "num_local_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "scoring_func": "sigmoid", "use_routing_bias": True,
        "routed_scaling_factor": 2.0, "num_mtp_modules": 1, "moe_layer_freq": sparse, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 2,
        "sparse_attention_config": {
            "use_sparse_attention": True, "sparse_index_dim": 32, "sparse_num_index_heads": 1, "sparse_topk_blocks": 4,
            "sparse_block_size": 128, "sparse_disable_index_value": sparse, "sparse_score_type": "max",
            "sparse_init_block": 0, "sparse_local_block": 1, "sparse_attention_freq": sparse,
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    }  # fmt: skip
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl",
        "text_config": text, "vision_config": vision, "projector_hidden_size": HIDDEN, "image_token_index": 900,
        "video_token_index": 901, "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip


def build_tiny_m3(folder: Path, seed: int = 0) -> Path:
    """Two dense layers, four with experts and sparse attention; its own template is ours without the tags."""
    import make_target
    import torch
    from stdlib_corpus import read_subjects
    from transformers import AutoConfig
    from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    config = m3_config(make_target.EMBEDDING_ROWS)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = MiniMaxM3SparseForConditionalGeneration(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as the hub has it, not as transformers rewrites it
    make_target.make_tokenizer(read_subjects()[:300]).save_pretrained(folder)
    ours = (ROOT / "chat_templates/minimax_m3.jinja").read_text()
    for tag in ("{%- generation -%}", "{%- endgeneration -%}"):
        ours = ours.replace(tag, "")
    (folder / "chat_template.jinja").write_text(ours)
    return folder

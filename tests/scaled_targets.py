"""Targets of random weights whose embeddings or logits are scaled: Gemma4 and Granite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SOFT_CAP = 3.0
"""Below many logits, so that the cap is felt; Gemma's is 30."""

EMBEDDING_MULTIPLIER = 12.0


def build_scaled_target(family: str, folder: Path) -> Path:
    """Gemma4: embeddings times sqrt(H), capped logits, a tied head. Granite: both factors from the config."""
    import make_target
    import torch
    import transformers
    from stdlib_corpus import read_subjects

    tokenizer = make_target.make_tokenizer(read_subjects()[:300])
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": make_target.EMBEDDING_ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.15, "dtype": "float32",
    }  # fmt: skip
    own: dict[str, Any] = {
        "gemma4": {
            "global_head_dim": 32, "layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"],
            "sliding_window": 32, "final_logit_softcapping": SOFT_CAP, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": make_target.EMBEDDING_ROWS,
        },
        "granite": {
            "embedding_multiplier": EMBEDDING_MULTIPLIER, "logits_scaling": 8.0, "residual_multiplier": 0.5,
            "attention_multiplier": 32**-0.5, "tie_word_embeddings": False,
        },
    }[family]  # fmt: skip
    name = {"gemma4": "Gemma4Text", "granite": "Granite"}[family]
    config = getattr(transformers, f"{name}Config")(**sizes, **own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Inputs of benchmarks/gpu/check.py, made on the spot: a random target without layers, a store of random states."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from contracts.ledger import LedgerWriter
from contracts.run import Run
from contracts.store import Manifest, Store
from contracts.store import StoredSample as Sample
from drafts import METHODS
from target.target import Target


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the target and of the samples, in elements and tokens."""

    hidden: int
    vocabulary: int
    tokens: int
    samples: int


SMALL = Sizes(hidden=64, vocabulary=320, tokens=96, samples=16)
LARGE = Sizes(hidden=1024, vocabulary=32_000, tokens=2048, samples=32)
NUM_LAYERS = 6
LAYER_IDS = [1, 3]
SMALL_KEYS = {
    "num_layers": 2, "num_anchors": 64, "ttt_length": 4, "markov_rank": 32, "selector_rank": 32,
    "lilicorr_hidden_size": 64, "lilicorr_num_heads": 4, "lilicorr_factor_dim": 64,
    "objective": "distill",  # of terms with a smooth gradient, so that rounding changes it little
}  # fmt: skip
"""Values of the methods' keys; each method takes those that it has."""


def write_target(folder: Path, sizes: Sizes) -> Target:
    """Write what training reads of a target: config, tokenizer, embedding, lm_head and final norm."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": sizes.hidden,
        "num_hidden_layers": NUM_LAYERS, "vocab_size": sizes.vocabulary, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(sizes.vocabulary - 8)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.vocabulary, sizes.hidden)
    tensors = {
        "model.embed_tokens.weight": torch.randn(shape, generator=generator) * 0.05,
        "lm_head.weight": torch.randn(shape, generator=generator) * 0.05,
        "model.norm.weight": torch.ones(sizes.hidden),
    }
    save_file(tensors, folder / "model.safetensors")
    return Target.read(folder)


def write_store(folder: Path, target: Target, sizes: Sizes, dtype: str = "bfloat16") -> Store:
    """Write a finished store of random states. Tokens repeat with a period, so that a draft can learn them."""
    inputs = {"conversations": "c" * 64, "target": target.fingerprint}
    run = Run.open(folder, "dump run", settings={}, inputs=inputs, recipe_yaml="")
    store = Store(folder)
    store.write_manifest(
        Manifest(
            target=str(target.path), target_fingerprint=target.fingerprint, quantization="none", layer_ids=LAYER_IDS,
            num_layers=NUM_LAYERS, hidden_size=sizes.hidden, final_norm="rms", tokenizer="", template="",
            engine="none", engine_version="", dtype=dtype, conversations="c" * 64,
        )
    )  # fmt: skip
    ledger = LedgerWriter(store.ledger_path)
    generator = torch.Generator().manual_seed(4)
    for number in range(sizes.samples):
        tokens = sizes.tokens - 8 * (number % 4)  # batches of other lengths must not recompile
        ids = (torch.arange(tokens) * 7 + number) % min(97, sizes.vocabulary - 8)
        sample = Sample(
            input_ids=ids.int(),
            loss_mask=torch.arange(tokens) >= tokens // 4,
            hidden_states=torch.randn(tokens, sizes.hidden, generator=generator),
            aux_hidden_states=torch.randn(tokens, len(LAYER_IDS) * sizes.hidden, generator=generator),
            metadata={"temperature": "0.0"},
        )
        sample_id = f"{number:032x}-0"
        fields = store.write_sample(sample_id, sample, dtype)
        ledger.append([{"id": sample_id, "status": "done", "tokens": tokens, **fields}])
    ledger.close()
    run.finish({"samples": sizes.samples})
    return store


def write_recipe(path: Path, target: Target, sizes: Sizes, method: str) -> Path:
    """Write a recipe of a small draft."""
    has = METHODS[method].section.model_fields
    own = ", ".join(f"{key}: {value}" for key, value in SMALL_KEYS.items() if key in has)
    heads = max(2, sizes.hidden // 128)
    path.write_text(
        f"target: {{path: {target.path}, max_model_len: {sizes.tokens}, aux_layers: {LAYER_IDS}}}\n"
        "train:\n"
        f"  draft: {{method: {method}, num_attention_heads: {heads}, num_key_value_heads: {heads // 2}, "
        f"head_dim: 32, intermediate_size: {2 * sizes.hidden}, {own}}}\n"
        "  num_steps: 20\n  global_batch_size: 2\n  warmup_steps: 2\n  checkpoint_every: 10\n"
    )
    return path

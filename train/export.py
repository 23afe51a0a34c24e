"""Export a trained draft to the directory that vLLM and SGLang load: z-lab's DFlash layout, EAGLE3's, or speculators'.

Reads:  a training run's chosen checkpoint.
Writes: OUTPUT/config.json (Qwen3 names, `dflash_config` with mask token and layers, rope in both schemas),
        OUTPUT/model.safetensors (no embedding, no lm_head: the server shares the target's),
        OUTPUT/README.md, the model card; OUTPUT/draftline.json (where it came from). Made under a temporary name and
        renamed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from contracts.draft import DraftConfig, DraftRun
from contracts.errors import UserError
from contracts.files import hash_file, read_json, write_json
from contracts.recipe import Recipe
from contracts.run import read_run
from contracts.store import DTYPES
from contracts.target import Target
from train.drafts import served_config
from train.rope import rope_parameters

ORIGIN_FILE = "draftline.json"
LAYOUTS = ("native", "speculators")


def export(
    recipe: Recipe, run_folder: Path, output: Path, evaluation: Path | None = None, layout: str = "native"
) -> None:
    """Write the draft of a finished run to `output`; an export of the same weights is kept.

    `evaluation`, a report of `train eval`, gives the model card its figures. `layout` is one of LAYOUTS.

    Raises UserError when `output` holds something else, when YaRN's window is not the context length, or for an unknown
    layout.
    """
    if layout not in LAYOUTS:
        raise UserError("--format", found=layout, expected=f"one of {', '.join(LAYOUTS)}", fix="Correct it.")
    read_run(run_folder, "train offline")
    run = DraftRun(run_folder)
    config = served_config(run.read_config(), recipe)
    weights = run.chosen_weights()
    origin = {
        "target_fingerprint": config.target_fingerprint,
        "store": config.store,
        "weights": f"{weights.parent.name}/{weights.name}",
        "sha256": hash_file(weights),
        "dtype": recipe.export.dtype,
        "layout": layout,
        "recipe": recipe.model_dump(mode="json"),
    }
    if output.exists():
        _refuse_foreign(output, origin)
        print(f"export: {output} is finished, skipped")
        return
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = DTYPES[recipe.export.dtype]
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in load_file(weights).items()
    }
    target = Target.read(recipe.target.path)
    exported = make_config(config, recipe.export.dtype, target)
    if layout == "speculators":
        exported = make_speculators_config(config, exported, target)
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    write_json(temporary / "config.json", exported)
    write_json(temporary / ORIGIN_FILE, origin)
    figures = read_json(evaluation, "a report of `train eval`") if evaluation else None
    (temporary / "README.md").write_text(make_card(config, recipe, origin, figures), encoding="utf-8")
    temporary.rename(output)
    print(f"export: {weights.parent.name} -> {output}")


def make_config(config: DraftConfig, dtype: str, target: Target) -> dict[str, Any]:
    """The exported config.json. `rope_parameters` is transformers 5's schema, `rope_scaling` the one before.

    EAGLE3 counts the captured layers as vLLM does, from 1.
    """
    rope = rope_parameters(config)
    if config.method == "dflash":
        own = {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "use_sliding_window": False,
            "layer_types": ["full_attention"] * config.num_layers,
            "dflash_config": {"mask_token_id": config.mask_token_id, "target_layer_ids": config.layer_ids},
        }
    else:
        own = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
            "num_aux_hidden_states": len(config.layer_ids),
            "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.layer_ids],
        }
    return {
        **own,
        "dtype": dtype,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": rope if config.yarn else None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": target.config.get("bos_token_id"),
        "eos_token_id": target.config.get("eos_token_id"),
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
    }


def make_speculators_config(config: DraftConfig, native: dict[str, Any], target: Target) -> dict[str, Any]:
    """The config in the format of speculators 0.9 (its SpeculatorModelConfig), from the native one.

    It counts captured layers from the embeddings on, for both methods.
    """
    layer_ids = [layer_id + 1 for layer_id in config.layer_ids]
    own_keys = ("architectures", "dtype", "block_size", "dflash_config", "draft_vocab_size")
    if config.method == "dflash":
        own = {
            "architectures": ["DFlashSpeculator"],
            "block_size": config.block_size,
            "aux_hidden_state_layer_ids": layer_ids,
            "mask_token_id": config.mask_token_id,
            "sample_from_anchor": False,
            "sliding_window_non_causal": True,
        }
    else:
        own = {
            "architectures": ["Eagle3Speculator"],
            "eagle_aux_hidden_state_layer_ids": layer_ids,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "norm_output": False,
        }
    return {
        "speculators_model_type": config.method,
        "speculators_version": "0.9.0",
        "dtype": native["dtype"],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        **own,
        "transformer_layer_config": {key: value for key, value in native.items() if key not in own_keys},
        "speculators_config": {
            "algorithm": config.method,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}],
            "verifier": {"name_or_path": str(target.path), "architectures": target.config.get("architectures", [])},
        },
    }


def make_card(config: DraftConfig, recipe: Recipe, origin: dict[str, Any], figures: dict[str, Any] | None) -> str:
    """The model card: what this draft is, what it was trained on, what it is worth, how it is served."""
    num_draft_tokens = config.block_size - 1
    speculation = {"method": config.method, "model": "<this folder>", "num_speculative_tokens": num_draft_tokens}
    worth = "Not evaluated: give `train export` the report of `train eval`."
    if figures is not None:
        low, high = figures["interval"]
        rows = "\n".join(
            f"| {mode or 'unset'} | {part['acceptance_length']:.3f} | {part['steps']} |"
            for mode, part in figures["by_mode"].items()
        )
        worth = (
            f"Simulated on {figures['samples']} held-out samples: acceptance length {figures['acceptance_length']:.3f} "
            f"(95% interval {low:.3f} to {high:.3f}) at K = {num_draft_tokens}; by position "
            f"{', '.join(f'{share:.3f}' for share in figures['per_position'])}.\n\n"
            f"| thinking mode | acceptance length | steps |\n|---|---|---|\n{rows}"
        )
    return f"""---
library_name: vllm
tags: [speculative-decoding, {config.method}]
---
# A {config.method} draft for {recipe.target.path.name}

{config.num_layers} layers, {config.hidden_size} wide, block size {config.block_size} (anchor included); reads the
outputs of the target's layers {config.layer_ids} (0-based). Embedding and lm_head are the target's.

## Serving

    vllm serve <target> --speculative-config '{json.dumps(speculation)}'

## What it is worth

{worth}

## Where it comes from

| what | |
|---|---|
| target's fingerprint | `{config.target_fingerprint}` |
| conversations (sha256) | `{config.store}` |
| weights (sha256) | `{origin["sha256"]}` |
| objective | {recipe.train.objective}, {recipe.train.num_steps} steps |

The whole recipe is in `{ORIGIN_FILE}`.
"""


def _refuse_foreign(output: Path, origin: dict[str, Any]) -> None:
    found = read_json(output / ORIGIN_FILE, "an export of `train export`")
    for key in ("sha256", "dtype", "layout", "target_fingerprint"):
        if found.get(key) != origin[key]:
            raise UserError(
                output,
                found=f"an export with {key} {str(found.get(key))[:12]}",
                expected=f"{origin[key][:12]}, or an empty place",
                fix="Delete it or choose another --output.",
            )

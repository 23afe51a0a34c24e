"""What an export's config has otherwise than the training had: the likely cause when served and trained differ."""

from __future__ import annotations

from pathlib import Path

from contracts.draft import DraftRun
from contracts.files import read_json
from contracts.store import Store
from contracts.target import Target


def explain_config(export: Path, draft: DraftRun, store: Store, target: Target) -> str:
    """The first such thing, in words; "" where there is none."""
    config, trained = read_json(export / "config.json", "an export"), draft.read_config()
    rope = config.get("rope_parameters") or {}
    dflash = config.get("dflash_config") or {}
    layer_ids = dflash.get("target_layer_ids")
    if trained.method == "eagle3":  # counts from the embeddings on
        layer_ids = [layer_id - 1 for layer_id in config.get("eagle_aux_hidden_state_layer_ids", [])]
    served_yarn = None if rope.get("rope_type", "default") == "default" else rope.get("factor")
    expected = {
        "layers that it reads": (layer_ids, store.read_manifest().layer_ids),
        "mask token (dflash_config.mask_token_id)": (dflash.get("mask_token_id"), trained.mask_token_id),
        "rope (rope_theta)": (rope.get("rope_theta", config.get("rope_theta")), target.rope_theta),
        "rope (YaRN factor)": (served_yarn, trained.yarn.factor if trained.yarn else None),
        "norm (rms_norm_eps)": (config.get("rms_norm_eps"), target.norm_eps),
    }
    for name, (value, wanted) in expected.items():
        if value != wanted:
            return f"The {name}: the export says {value}, training had {wanted}."
    return ""

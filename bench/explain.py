"""Find where an export's config differs from training, the likely cause if served and predicted acceptance differ."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

from common.files import read_json
from contracts.draft import DraftRun
from contracts.store import Store
from drafts import METHODS
from drafts.published import describe_config, read_config


def explain_config(export: Path, draft: DraftRun, store: Store) -> str:
    """Return the first difference of the export's config.json from training as a sentence, or ""."""
    served, trained = describe_config(export), read_config(draft)
    expected = {
        "layers that it reads": (served.layer_ids, store.read_manifest().layer_ids),
        "mask token": (served.mask_token_id, trained.mask_token_id),
        "rope (rope_theta)": (served.rope_theta, trained.rope_theta),
        "rope (YaRN factor)": (served.yarn_factor, trained.yarn.factor if trained.yarn else None),
        "norm (rms_norm_eps)": (served.rms_norm_eps, trained.rms_norm_eps),
    }
    config = read_json(export / "config.json", "a draft exported by `train export`")
    config = {**config, **(config.get("transformer_layer_config") or {})}
    for path, wanted in METHODS[trained.method].served_keys(trained).items():
        *nested, key = path.split(".")
        values = reduce(lambda values, name: values.get(name) or {}, nested, config)
        expected[key] = (values.get(key), wanted)
    for name, (value, wanted) in expected.items():
        if value != wanted:
            return f"The {name}: the export says {value}, training had {wanted}."
    return ""

"""Write a store in the layouts of other trainers.

modelopt:    OUTPUT/<sample id>.pt, as contracts/modelopt.py says; hidden_states before the final norm, and so flagged.
speculators: OUTPUT/hidden_states/hs_<row>.safetensors with hidden_states (T, n+1, H), last the final state before the
             final norm, and token_ids (T,); OUTPUT itself is a `datasets` folder with input_ids, loss_mask, seq_len.

Both say in OUTPUT/manifest.json what the states are, as our own store does. Files that are there already stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from contracts.errors import UserError
from contracts.files import write_json
from contracts.modelopt import write_modelopt
from contracts.run import read_run
from contracts.store import Store, StoredSample

LAYOUTS = ("modelopt", "speculators")


def convert(folder: Path, output: Path, layout: str) -> int:
    """Convert every sample of a finished store; how many there are. Raises UserError for an unknown layout."""
    if layout not in LAYOUTS:
        raise UserError("--to", found=layout, expected=f"one of {', '.join(LAYOUTS)}", fix="Correct it.")
    store = Store(folder)
    manifest = store.read_manifest()
    read_run(folder, "dump run")
    ids = store.sample_ids()
    if not ids:
        raise UserError(
            folder, found="no sample", expected="at least one", fix="Dump conversations that were finished."
        )
    output.mkdir(parents=True, exist_ok=True)
    samples = ((id_, store.read_sample(id_)) for id_ in tqdm(ids, desc="convert", unit="sample", disable=None))
    if layout == "modelopt":
        for sample_id, sample in samples:
            path = output / f"{sample_id}.pt"
            if not path.exists():
                write_modelopt(path, sample_id, sample)
    else:
        _write_speculators(output, samples)
    write_json(output / "manifest.json", {**manifest.model_dump(), "layout": layout, "samples": len(ids)})
    print(f"dump: {len(ids)} samples in {layout}'s layout, final states {manifest.final_state} -> {output}")
    return len(ids)


def _write_speculators(output: Path, samples: Iterator[tuple[str, StoredSample]]) -> None:
    import datasets

    folder = output / "hidden_states"
    folder.mkdir(exist_ok=True)

    def rows() -> Iterator[dict[str, Any]]:
        for number, (_, sample) in enumerate(samples):
            path = folder / f"hs_{number}.safetensors"
            if not path.exists():
                layers = sample.aux_hidden_states.unflatten(1, (sample.num_layers, -1))
                states = torch.cat([layers, sample.hidden_states[:, None]], dim=1).contiguous()
                temporary = path.with_suffix(".tmp")
                save_file({"hidden_states": states, "token_ids": sample.input_ids.long()}, temporary)
                temporary.rename(path)
            yield {
                "input_ids": sample.input_ids.tolist(),
                "loss_mask": sample.loss_mask.int().tolist(),
                "seq_len": sample.num_tokens,
            }

    dataset = datasets.Dataset.from_list(list(rows()))
    dataset.set_format("torch")  # the trainer compares its tokens with those of the states
    dataset.save_to_disk(str(output))

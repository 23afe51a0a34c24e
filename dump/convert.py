"""Write a store in the layouts of other trainers.

modelopt:    OUTPUT/<sample id>.pt (contracts/modelopt.py) with hidden_states before the final norm and the flag for it.
speculators: OUTPUT/hidden_states/hs_<row>.safetensors with hidden_states (T, n+1, H), the last being the final state
             before the final norm, and token_ids (T,); OUTPUT is a `datasets` folder of input_ids, loss_mask, seq_len.

Both have our manifest in OUTPUT/manifest.json. Existing files of states are kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import UserError
from common.files import make_folder, write_json
from common.progress import track
from contracts.modelopt import write_modelopt
from contracts.run import read_run
from contracts.store import Store, StoredSample, require_all_states

LAYOUTS = ("modelopt", "speculators")
ROWS_IN_MEMORY = 16


def convert(folder: Path, output: Path, layout: str) -> int:
    """Convert all samples of a finished store; return their number. Raises UserError for an unknown layout."""
    if layout not in LAYOUTS:
        raise UserError("--to", found=layout, expected=f"one of {', '.join(LAYOUTS)}", fix="Correct it.")
    store = Store(folder)
    manifest = store.read_manifest()
    read_run(folder, "dump run")
    require_all_states(folder, manifest)
    ids = store.sample_ids()
    if not ids:
        raise UserError(
            folder, found="no sample", expected="at least one", fix="Dump conversations that were finished."
        )
    make_folder(output)
    samples = ((id_, store.read_sample(id_)) for id_ in track(ids, "convert", "sample"))
    if layout == "modelopt":
        for sample_id, sample in samples:
            path = output / f"{sample_id}.pt"
            if not path.exists():
                write_modelopt(path, sample_id, sample)
    else:
        _write_speculators(output, samples)
    write_json(
        output / "manifest.json", {**manifest.model_dump(exclude_none=True), "layout": layout, "samples": len(ids)}
    )
    print(f"dump: {len(ids)} samples in {layout}'s layout, final states {manifest.final_state} -> {output}")
    return len(ids)


def _write_speculators(output: Path, samples: Iterable[tuple[str, StoredSample]]) -> None:
    """Write the folder that speculators reads; token ids are written a few samples at a time."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = output / "hidden_states"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".rows-") as temporary:
        path = Path(temporary) / "rows.arrow"
        with ArrowWriter(path=str(path), features=_features(), writer_batch_size=ROWS_IN_MEMORY) as writer:
            for number, (_, sample) in enumerate(samples):
                _write_states(folder / f"hs_{number}.safetensors", sample)
                row = {"input_ids": sample.input_ids.long().numpy(), "loss_mask": sample.loss_mask.long().numpy()}
                writer.write({**row, "seq_len": sample.num_tokens})
            writer.finalize()
        dataset = datasets.Dataset.from_file(str(path))  # memory-mapped
        dataset.set_format("torch")  # the trainer compares these ids with the states' tensors
        dataset.save_to_disk(str(output))


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int64")), "loss_mask": List(Value("int64")), "seq_len": Value("int64")})


def _write_states(path: Path, sample: StoredSample) -> None:
    """Write one sample's states and token ids, unless they exist. A retried dump may change row numbers."""
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if torch.equal(file.get_tensor("token_ids"), sample.input_ids.long()):
                return
    layers = sample.aux_hidden_states.unflatten(1, (sample.num_layers, -1))
    states = torch.cat([layers, sample.hidden_states[:, None]], dim=1).contiguous()
    temporary = path.with_suffix(".tmp")
    save_file({"hidden_states": states, "token_ids": sample.input_ids.long()}, temporary)
    temporary.rename(path)

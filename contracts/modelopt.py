"""Hidden states in the layout of NVIDIA's Model-Optimizer, which `dump convert` writes and `train` reads.

One file per sample, <name>.pt, a dictionary of tensors: input_ids (T,) int64, hidden_states (T, H), aux_hidden_states
(T, n*H), loss_mask (T,) int64, and conversation_id. The optional flag hidden_states_prenorm means that hidden_states is
the final state before the final norm; without it ModelOpt treats it as normed (`OfflineSupervisedDataset` in
modelopt/torch/speculative/eagle/utils.py). `dump convert` also writes our manifest.json.

Files are found by listing the folder, never by the conversation_id in them. They are loaded with `weights_only`, so
they cannot run code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import hash_json, read_json
from contracts.store import Manifest, StoredSample
from contracts.target_identity import TargetIdentity

KEYS = ("input_ids", "hidden_states", "aux_hidden_states", "loss_mask")


def write_modelopt(path: Path, sample_id: str, sample: StoredSample) -> None:
    """Write one sample atomically."""
    temporary = path.with_suffix(".tmp")
    value = {
        "input_ids": sample.input_ids.long(),
        "hidden_states": sample.hidden_states.clone(),
        "aux_hidden_states": sample.aux_hidden_states.clone(),
        "loss_mask": sample.loss_mask.long(),
        "conversation_id": sample_id,
        "hidden_states_prenorm": True,
    }
    torch.save(value, temporary)
    temporary.rename(path)


class ModelOptStore:
    """A folder in this layout, with the reading methods of `contracts.store.Store`."""

    def __init__(self, folder: Path, layer_ids: Sequence[int], hidden_size: int) -> None:
        self.folder = folder
        self.layer_ids = list(layer_ids)
        self.hidden_size = hidden_size

    @property
    def checksum(self) -> str:
        """The hash of the names and sizes of all files."""
        return hash_json([(path.name, path.stat().st_size) for path in sorted(self.folder.glob("*.pt"))])

    def sample_ids(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.pt"))

    def sample_path(self, sample_id: str) -> Path:
        """Return a sample's path. Raises ValueError for an id that is not a plain file name."""
        if Path(sample_id).name != sample_id or "\0" in sample_id:
            raise ValueError(f"sample id {sample_id!r} is not a file name")
        return self.folder / f"{sample_id}.pt"

    def read_token_ids(self, sample_id: str) -> torch.Tensor:
        """Read a sample's token ids `(T,)`; its other tensors are memory-mapped, not read."""
        ids: torch.Tensor = _load(self.sample_path(sample_id))["input_ids"]
        return ids

    def read_mask(self, sample_id: str) -> torch.Tensor:
        """Read a sample's loss mask `(T,)`."""
        mask: torch.Tensor = _load(self.sample_path(sample_id))["loss_mask"]
        return mask.bool()

    def lengths(self) -> dict[str, int]:
        """Return nothing: this layout has no lengths."""
        return {}

    def read_sample(self, sample_id: str, *, final_states: bool = True, decode: bool = True) -> StoredSample:  # noqa: ARG002
        """Read one sample; its states are memory-mapped, and read when they are used.

        Raises UserError if the file is not a sample or holds another number of layers.
        """
        path = self.sample_path(sample_id)
        value = _load(path)
        states = value["hidden_states"]
        num_tokens, hidden_size = value["input_ids"].shape[0], self.hidden_size
        expected = {
            "hidden_states": (num_tokens, hidden_size),
            "aux_hidden_states": (num_tokens, len(self.layer_ids) * hidden_size),
            "loss_mask": (num_tokens,),
        }
        for name, shape in expected.items():
            if tuple(value[name].shape) != shape:
                raise UserError(
                    f"{path} ({name})",
                    found=f"shape {tuple(value[name].shape)}",
                    expected=f"{shape}: layers {self.layer_ids} of {hidden_size}",
                    fix="Set target.aux_layers to the layers that were dumped (0-based outputs).",
                )
        metadata = {"conversation_id": str(value.get("conversation_id", "")), "temperature": ""}
        ids, mask = value["input_ids"].to(torch.int32), value["loss_mask"].bool()
        return StoredSample(ids, mask, states, value["aux_hidden_states"], metadata)


def _load(path: Path) -> dict[str, Any]:
    try:
        value = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many types; all mean that this is not a file of tensors
        raise UserError(
            path,
            found=f"not a file of tensors ({str(error).splitlines()[0]})",
            expected="a sample in ModelOpt's layout",
            fix="Delete it, or dump it again.",
        ) from None
    missing = [key for key in KEYS if not isinstance(value, dict) or not isinstance(value.get(key), torch.Tensor)]
    if missing:
        raise UserError(
            path,
            found=f"no {', '.join(missing)}",
            expected=f"a dictionary of {', '.join(KEYS)}",
            fix="Dump again with --answer-only-loss, which writes the loss mask.",
        )
    return dict(value)


def is_modelopt(folder: Path) -> bool:
    """Return whether a folder is in this layout."""
    return not (folder / "samples").exists() and any(folder.glob("*.pt"))


def open_modelopt(
    folder: Path, target: TargetIdentity, layer_ids: Sequence[int] | None
) -> tuple[ModelOptStore, Manifest]:
    """Open a folder with its manifest, or with one built from the recipe's layers and the first file.

    Raises UserError for states of another target, or if neither a manifest nor the recipe has the layer ids.
    """
    if (folder / "manifest.json").exists():
        entries = read_json(folder / "manifest.json", "a manifest")
        manifest = Manifest.model_validate({k: v for k, v in entries.items() if k not in ("layout", "samples")})
        if manifest.target_fingerprint != target.fingerprint:
            raise UserError(
                folder,
                found=f"states of target {manifest.target_fingerprint[:12]} ({manifest.target})",
                expected=f"states of {target.fingerprint[:12]} ({target.path})",
                fix="Give the store that was dumped from this target.",
            )
        return ModelOptStore(folder, manifest.layer_ids, manifest.hidden_size), manifest
    if layer_ids is None:
        raise UserError(
            folder,
            found="states with no layer ids recorded",
            expected="target.aux_layers in the recipe: the layers that were dumped, as 0-based outputs",
            fix="Set it. Dumps of ModelOpt's vLLM script for DFlash are one layer early: vLLM counts from 1.",
        )
    store = ModelOptStore(folder, layer_ids, target.hidden_size)
    first = _load(store.sample_path(store.sample_ids()[0]))
    manifest = Manifest(
        target=str(target.path),
        target_fingerprint=target.fingerprint,
        quantization="unknown",
        layer_ids=list(layer_ids),
        num_layers=target.num_layers,
        hidden_size=target.hidden_size,
        final_norm=target.final_norm,
        final_state="pre-norm" if first.get("hidden_states_prenorm") else "normed",
        tokenizer=target.tokenizer_checksum,
        template=target.template_checksum,
        engine="unknown",
        engine_version="unknown",
        dtype=str(first["hidden_states"].dtype).removeprefix("torch."),
        conversations=store.checksum,
    )
    return store, manifest

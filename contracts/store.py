"""The hidden-state store: what `dump` writes and `train` reads. A folder that a person can open:

    manifest.json                     what these states are (target, layers, dtype, checksums)
    ledger.jsonl                      one line a sample: size and sha256 of its file
    samples/3f/3f9c...-0.safetensors  one sample: conversation id, dash, number of the sample in it

Tensors of a sample of T tokens, hidden size H and n captured layers:
    input_ids (T,) int32; loss_mask (T,) bool, true where the target generated the token;
    hidden_states (T, H), the final state BEFORE the final norm; aux_hidden_states (T, n*H), outputs of the layers in
    the manifest's order. Metadata: conversation_id, category, thinking_mode, finish_reason, temperature.

With dtype fp8_e4m3 (OCP 8-bit float, no infinities, largest 448) each token of each layer has a scale of its own, so
that its largest value becomes 448: hidden_states_scale (T, 1), aux_hidden_states_scale (T, n), fp32; fp8 * scale.

One folder may be filled by several processes, each with a shard (by conversation id): their ledgers are in
shards/<i>-of-<n>/ until the last one joins them.
"""

from __future__ import annotations

import fcntl
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open

from contracts.errors import UserError
from contracts.files import hash_bytes, hash_file, read_json, write_json
from contracts.ledger import Ledger, read_entries
from contracts.run import read_run
from contracts.shards import shard_folder
from contracts.target import Target
from contracts.tensor_file import Buffer, plan_file

SAMPLE_ID = re.compile(r"[0-9a-f]{32}-[0-9]+")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
FP8_MAX = 448.0
STATES = ("hidden_states", "aux_hidden_states")


class Manifest(BaseModel):
    """What the states in a store are."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = 1
    target: str
    target_fingerprint: str
    quantization: str
    layer_ids: list[int]
    num_layers: int
    hidden_size: int
    final_norm: str
    final_state: str = "pre-norm"
    tokenizer: str
    template: str
    engine: str
    engine_version: str
    dtype: str
    conversations: str = ""
    conversations_folder: str = ""


@dataclass
class StoredSample:
    """One sample in memory. Shapes: (T,) int32; (T,) bool; (T, H); (T, n*H); metadata: str -> str."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden_states: torch.Tensor
    aux_hidden_states: torch.Tensor
    metadata: dict[str, str]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_layers(self) -> int:
        return self.aux_hidden_states.shape[1] // self.hidden_states.shape[1]


class Store:
    """A store's folder; file names are decided here and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def checksum(self) -> str:
        """Names what this store holds: the hash of its ledger, which has every file's."""
        return hash_file(self.ledger_path)

    def sample_path(self, sample_id: str) -> Path:
        """Where a sample lies. Raises ValueError for an id that `dump` did not make (it could leave the folder)."""
        if not SAMPLE_ID.fullmatch(sample_id):
            raise ValueError(f"sample id {sample_id!r} is not <32 hex digits>-<number>")
        return self.folder / "samples" / sample_id[:2] / f"{sample_id}.safetensors"

    def shard_folder(self, number: int, count: int) -> Path:
        """Where a shard keeps its ledger until all are joined."""
        return shard_folder(self.folder, number, count)

    def write_manifest(self, manifest: Manifest) -> None:
        write_json(self.manifest_path, manifest.model_dump())

    def claim(self, manifest: Manifest) -> None:
        """Write the manifest, or agree with the one that is there. Raises UserError for another one.

        Which conversations these are is not known before all shards have read theirs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "claim.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several shards may begin at once
            if not self.manifest_path.exists():
                return self.write_manifest(manifest)
        found = self.read_manifest()
        known = manifest.conversations and found.conversations
        told = {"target", "conversations_folder"} if known else {"target", "conversations_folder", "conversations"}
        for key, value in manifest.model_dump(exclude=told).items():
            if getattr(found, key) != value:
                raise UserError(
                    f"{self.manifest_path} ({key})",
                    found=str(getattr(found, key)),
                    expected=str(value),
                    fix="This store holds other states: choose another --output.",
                )
        return None

    def read_manifest(self) -> Manifest:
        """Raises UserError when the folder is no store."""
        value = read_json(self.manifest_path, "a hidden-state store's manifest, as `dump run` writes it")
        try:
            return Manifest.model_validate(value)
        except ValidationError as error:
            raise UserError(
                self.manifest_path,
                found=f"{error.error_count()} fields that do not fit",
                expected="a manifest of this version",
                fix="Dump again with this version of Draftline.",
            ) from None

    def write_sample(
        self, sample_id: str, sample: StoredSample, dtype: str | None = None, buffer: Buffer | None = None
    ) -> dict[str, Any]:
        """Write one sample for good (temporary name, sync, rename); `{size, sha256}` for its ledger line.

        The states are stored in `dtype`, or as they are; `buffer` is memory to use again for the next sample.
        """
        tensors = {
            "input_ids": sample.input_ids.to(torch.int32),
            "loss_mask": sample.loss_mask,
            **_encode("hidden_states", sample.hidden_states[:, None], dtype),
            **_encode("aux_hidden_states", sample.aux_hidden_states.unflatten(1, (sample.num_layers, -1)), dtype),
        }
        stored = DTYPES[dtype] if dtype else sample.hidden_states.dtype
        places = {name: (stored if name in STATES else t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        layout = plan_file(places, sample.metadata)
        buffer = buffer or Buffer()
        data = buffer.fill(layout, tensors)
        fields = {"size": layout.size, "sha256": hash_bytes(data)}
        path = self.sample_path(sample_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            buffer.write(temporary, layout.size)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk: what it took is of use
            raise
        temporary.rename(path)
        return fields

    def read_sample(self, sample_id: str) -> StoredSample:
        """Read one sample. Raises UserError when its file is missing or broken."""
        path = self.sample_path(sample_id)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                for name in STATES:
                    scale = tensors.pop(f"{name}_scale", None)
                    if scale is not None:
                        tensors[name] = _decode(tensors[name], scale)
                return StoredSample(**tensors, metadata=file.metadata() or {})
        except Exception as error:  # safetensors raises several kinds; all of them mean: not a sample
            raise UserError(
                path,
                found=f"an unreadable sample ({error})",
                expected="a sample written by `dump run`",
                fix="Delete the file and run `dump run` again.",
            ) from None

    def sample_ids(self) -> list[str]:
        """Ids of all finished samples, sorted: an order that no resume changes."""
        ledger = Ledger(self.ledger_path)
        ledger.close()
        return sorted(ledger.ids("done"))

    def lengths(self) -> dict[str, int]:
        """Tokens of every finished sample, from the ledger."""
        entries = read_entries(self.ledger_path)
        return {entry["id"]: int(entry["tokens"]) for entry in entries if entry["status"] == "done"}

    def read_mask(self, sample_id: str) -> torch.Tensor:
        """A sample's loss mask `(T,)` alone."""
        with safe_open(self.sample_path(sample_id), framework="pt") as file:
            mask: torch.Tensor = file.get_tensor("loss_mask")
        return mask

    def check_file(self, sample_id: str, entry: dict[str, Any]) -> None:
        """Raise UserError unless the file has the size and sha256 of its ledger entry."""
        path = self.sample_path(sample_id)
        found = (path.stat().st_size, hash_file(path)) if path.exists() else (0, "no file")
        if found != (entry["size"], entry["sha256"]):
            raise UserError(
                path,
                found=f"{found[0]} bytes, sha256 {found[1][:12]}",
                expected=f"{entry['size']} bytes, sha256 {entry['sha256'][:12]} as in the ledger",
                fix="Delete the store and dump again; look for a failing disk.",
            )


def _encode(name: str, states: torch.Tensor, dtype: str | None) -> dict[str, torch.Tensor]:
    """`states (T, n, H)` as `(T, n*H)`, to be cast as they are stored; scaled, with their scales, for fp8."""
    if dtype != "fp8_e4m3":
        return {name: states.flatten(1)}
    scale = (states.float().abs().amax(-1) / FP8_MAX).clamp_min(1e-30)
    scaled = (states.float() / scale[..., None]).clamp_(-FP8_MAX, FP8_MAX)
    return {name: scaled.flatten(1), f"{name}_scale": scale}


def _decode(coded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16 states `(T, n*H)` of fp8 ones and their scales `(T, n)`."""
    states = coded.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return states.flatten(1).to(torch.bfloat16)


def sample_bytes(num_tokens: int, hidden_size: int, num_layers: int, dtype: str) -> int:
    """Bytes of a sample's tensors, of `num_layers` captured layers: ids, mask, states, scales; the header is extra."""
    states = (num_layers + 1) * hidden_size * DTYPES[dtype].itemsize
    scales = (num_layers + 1) * 4 if dtype == "fp8_e4m3" else 0
    return num_tokens * (states + scales + 5)


def open_store(folder: Path, target: Target) -> tuple[Store, Manifest]:
    """A finished store made from `target`, and its manifest.

    Raises UserError when the dump is unfinished, or when the states came out of another target.
    """
    store = Store(folder)
    manifest = store.read_manifest()
    read_run(folder, "dump run")
    if manifest.target_fingerprint != target.fingerprint:
        raise UserError(
            folder,
            found=f"states of target {manifest.target_fingerprint[:12]} ({manifest.target})",
            expected=f"states of {target.fingerprint[:12]} ({target.path})",
            fix="Give the store that was dumped from this target, or dump again.",
        )
    return store, manifest

"""The hidden-state store, which `dump` writes and `train` reads.

    manifest.json                     target, layers, dtype and checksums of the states
    ledger.jsonl                      one line per sample: size and sha256 of its file
    samples/3f/3f9c...-0.safetensors  one sample: conversation id, dash, number of the sample in the conversation

Tensors of a sample with T tokens, hidden size H and n captured layers:
    input_ids (T,) int32
    loss_mask (T,) bool, true where the target generated the token
    hidden_states (T, H), the final state BEFORE the final norm
    aux_hidden_states (T, n*H), the outputs of the layers in the manifest's order
Metadata: conversation_id, category, thinking_mode, finish_reason, temperature, sampling.

With dtype fp8_e4m3 (OCP 8-bit float, no infinities, largest value 448) each token of each layer is scaled so that its
largest value becomes 448: hidden_states_scale (T, 1), aux_hidden_states_scale (T, n), fp32. A state is fp8 * scale.

With dtype int4 the captured layers have 4 bits per value and an fp16 scale per 32 neighbouring ones (`encode_int4`):
aux_hidden_states (T, n*H/2) uint8, aux_hidden_states_scale (T, n*H/32); the final states are fp8_e4m3.

A store may lack the final states (`final_state` "none" in the manifest), or hold the target's k most likely next tokens
in their place ("top-k"), at the P positions before generated tokens: top_ids (P, k) uint16 or int32, the most likely
first; top_log_probs (P, k+1) fp16, the last that of all other tokens together.

A store may leave out states that no supervised block sees (`unseen_states` "dropped"). Tensors then have fewer rows:
<name>_spans (m, 2) int32 are the half-open spans of the tokens whose rows are there, in their order.

Several processes may fill one folder, each with a shard of the conversations: their ledgers are in
shards/<i>-of-<n>/ until the last one joins them. Readers never write: a store may be read-only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import hash_file, lock_file, read_json, write_json
from common.progress import Progress
from common.tensor_file import Buffer
from contracts.ledger import Ledger
from contracts.run import read_run
from contracts.sample_file import (
    DTYPES,
    SampleForm,
    StoredSample,
    read_sample_file,
    read_sample_tensor,
    read_sample_tokens,
    write_sample_file,
)
from contracts.shards import shard_folder
from contracts.target_identity import TargetIdentity

__all__ = [
    "DTYPES",
    "Manifest",
    "Store",
    "StoredSample",
    "find_token",
    "open_store",
    "refuse_other_target",
    "require_all_states",
    "require_final_states",
]

SAMPLE_ID = re.compile(r"[0-9a-f]{32}-[0-9]+")
ROLLING_FILE = "window.json"
"""A file that only rolling stores have (contracts/rolling.py)."""
READERS = 16
"""Threads of `find_token`: opening many small files mostly waits for the disk."""


class Manifest(BaseModel):
    """The description of a store's states.

    `top_k`: tokens of each position, with `final_state` "top-k". `seen_reach`: with `unseen_states` "dropped", the
    tokens before an anchor that a block may see; None: all.
    """

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
    tensor_parallel_size: int = 1
    dtype: str
    conversations: str = ""
    conversations_folder: str = ""
    top_k: int | None = None
    unseen_states: Literal["dropped"] | None = None
    seen_reach: int | None = None

    @property
    def form(self) -> SampleForm:
        """The form of the samples."""
        return SampleForm(
            self.hidden_size,
            len(self.layer_ids),
            self.dtype,
            self.final_state,
            self.top_k,
            has_spans=self.unseen_states is not None,
        )


class Store:
    """A store's folder and the only place that knows its file names."""

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
        """Hash of the ledger, which holds the hash of every sample."""
        return hash_file(self.ledger_path)

    def sample_path(self, sample_id: str) -> Path:
        """Return a sample's path. Raises ValueError for a malformed id, which could point outside the folder."""
        if not SAMPLE_ID.fullmatch(sample_id):
            raise ValueError(f"sample id {sample_id!r} is not <32 hex digits>-<number>")
        return self.folder / "samples" / sample_id[:2] / f"{sample_id}.safetensors"

    def shard_folder(self, number: int, count: int) -> Path:
        """Return the folder that holds a shard's ledger until all shards are joined."""
        return shard_folder(self.folder, number, count)

    def write_manifest(self, manifest: Manifest) -> None:
        write_json(self.manifest_path, manifest.model_dump(exclude_none=True))

    def claim(self, manifest: Manifest) -> None:
        """Write the manifest, or compare it with the existing one.

        An empty checksum of the conversations is not compared: a shard does not know it. Raises UserError if they
        differ, or if the file system has no locks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "claim.lock").open("a") as lock:
            lock_file(lock, self.folder, wait=True)  # several shards may begin at once
            if not self.manifest_path.exists():
                return self.write_manifest(manifest)
        found = self.read_manifest()
        # The states are un-normed, so the kind of final norm does not change them.
        ignored = {"target", "conversations_folder", "final_norm", "tensor_parallel_size"}
        if not (manifest.conversations and found.conversations):
            ignored.add("conversations")
        for key, value in manifest.model_dump(exclude=ignored).items():
            if getattr(found, key) != value:
                raise UserError(
                    f"{self.manifest_path} ({key})",
                    found=str(getattr(found, key)),
                    expected=str(value),
                    fix="This store holds other states: choose another --output.",
                )
        return None

    def read_manifest(self) -> Manifest:
        """Read the manifest. Raises UserError if the folder is not a store."""
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
        self,
        sample_id: str,
        sample: StoredSample,
        dtype: str | None = None,
        buffer: Buffer | None = None,
        *,
        final_states: bool = True,
    ) -> dict[str, Any]:
        """Write one sample durably; see `write_sample_file`."""
        path = self.sample_path(sample_id)
        return write_sample_file(path, sample, dtype, buffer or Buffer(), final_states=final_states)

    def read_sample(self, sample_id: str, *, final_states: bool = True, decode: bool = True) -> StoredSample:
        """Read one sample; see `read_sample_file`."""
        return read_sample_file(self.sample_path(sample_id), final_states=final_states, decode=decode)

    def read_tokens(self, sample_id: str) -> StoredSample:
        """Read a sample's tokens, mask and metadata without its states; see `read_sample_tokens`."""
        return read_sample_tokens(self.sample_path(sample_id))

    def read_mask(self, sample_id: str) -> torch.Tensor:
        """Read a sample's loss mask `(T,)` alone."""
        return read_sample_tensor(self.sample_path(sample_id), "loss_mask")

    def read_token_ids(self, sample_id: str) -> torch.Tensor:
        """Read a sample's token ids `(T,)` alone."""
        return read_sample_tensor(self.sample_path(sample_id), "input_ids")

    def sample_ids(self) -> list[str]:
        """Return the ids of all stored samples, sorted, so that a resume does not change their order."""
        return sorted(Ledger(self.ledger_path).ids("done"))

    def lengths(self) -> dict[str, int]:
        """Return the number of tokens of every stored sample, from the ledger."""
        entries = Ledger(self.ledger_path).entries
        return {id_: int(entry["tokens"]) for id_, entry in entries.items() if entry["status"] == "done"}

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


def open_store(folder: Path, target: TargetIdentity) -> tuple[Store, Manifest]:
    """Open a finished store made from `target`; return it with its manifest.

    Raises UserError if the dump is unfinished or of another target.
    """
    if (folder / ROLLING_FILE).exists():
        raise UserError(
            folder,
            found="a rolling store",
            expected="a whole one",
            fix="Train on it with --follow; nothing else reads it.",
        )
    store = Store(folder)
    manifest = store.read_manifest()
    read_run(folder, "dump run")
    refuse_other_target(folder, manifest, target)
    return store, manifest


def refuse_other_target(folder: Path, manifest: Manifest, target: TargetIdentity) -> None:
    """Raise UserError if a store's states are not those of `target`."""
    if manifest.target_fingerprint != target.fingerprint:
        raise UserError(
            folder,
            found=f"states of target {manifest.target_fingerprint[:12]} ({manifest.target})",
            expected=f"states of {target.fingerprint[:12]} ({target.path})",
            fix="Give the store that was dumped from this target, or dump again.",
        )


def require_final_states(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if a store lacks the final states."""
    if manifest.final_state in ("none", "top-k"):
        key = "drop" if manifest.final_state == "none" else "top-k"
        raise UserError(
            folder,
            found=f"a store without final states (dump.final_states={key})",
            expected="final states, from which the target's logits are computed",
            fix="Give a store that was dumped with dump.final_states=keep.",
        )


def require_all_states(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if a store lacks the final states, or states of some tokens."""
    require_final_states(folder, manifest)
    if manifest.unseen_states is not None:
        raise UserError(
            folder,
            found="a store without the states that no block sees (dump.unseen_states=drop)",
            expected="the states of all tokens",
            fix="Give a store that was dumped with dump.unseen_states=keep.",
        )


class TokenSource(Protocol):
    """The part of `Store` and `contracts.modelopt.ModelOptStore` that `find_token` reads."""

    def read_token_ids(self, sample_id: str) -> torch.Tensor: ...


def find_token(store: TokenSource, token_id: int, ids: Sequence[str]) -> str | None:
    """Return the first of the samples `ids` that holds `token_id`, or None. Only token ids are read."""

    def holds(sample_id: str) -> bool:
        return bool((store.read_token_ids(sample_id) == token_id).any())

    with ThreadPoolExecutor(READERS) as pool, Progress(len(ids), "check tokens", "sample") as progress:
        for first in range(0, len(ids), 64 * READERS):
            some = ids[first : first + 64 * READERS]
            for sample_id, found in zip(some, pool.map(holds, some), strict=True):
                if found:
                    return sample_id
                progress.update()
    return None

"""Read the tensors of a draft's folder: safetensors or torch files, whole or in shards.

Nothing in a folder can run code: torch files are read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError
from common.files import hash_file, hash_json, read_json

SUFFIXES = ("safetensors", "bin", "pt")
"""Endings of weight files, the preferred one first."""
MASK_EMBEDDING = "mask_embedding.pt"
"""A mask token's own embedding, which some DFlash drafts keep in a file of this name."""


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder by their names in its files. Raises UserError if it has none."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors.update(_read_file(path))
    if (folder / MASK_EMBEDDING).exists():
        tensors.update(_read_file(folder / MASK_EMBEDDING))
    return tensors


def hash_weights(folder: Path) -> str:
    """Return the hash of a folder's weights: that of its file, or of the hashes of its shards."""
    hashes = [hash_file(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hash_json(hashes)


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a folder's weights. Raises UserError if there is none or a shard is missing."""
    for suffix in SUFFIXES:
        indexes = sorted(folder.glob(f"*.{suffix}.index.json"))
        files = list(_of_index(indexes[0])) if indexes else sorted(folder.glob(f"*.{suffix}"))
        files = [path for path in files if path.name != MASK_EMBEDDING]
        if files:
            return files
    raise UserError(
        folder,
        found="no weights",
        expected="model.safetensors, its shards with their index, or pytorch_model.bin",
        fix="Give the complete folder of a draft.",
    )


def _of_index(index: Path) -> Iterator[Path]:
    for name in sorted(set(read_json(index, "an index of shards")["weight_map"].values())):
        path = index.parent / Path(name).name  # never outside of the folder
        if not path.exists():
            raise UserError(index, found=f"no {path.name}", expected="every shard", fix="Copy the folder again.")
        yield path


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            path,
            found=f"a file that cannot be read ({str(error).splitlines()[0][:120]})",
            expected="tensors by name",
            fix="Copy the file again, or convert it to safetensors.",
        ) from None
    if isinstance(found, torch.Tensor):  # a file of one tensor
        return {path.stem: found}
    return {str(name): value for name, value in dict(found).items() if isinstance(value, torch.Tensor)}

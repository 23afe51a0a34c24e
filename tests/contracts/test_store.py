"""Claims about the store: what is written is read back, ids cannot leave the folder, broken files are named.

One claim is made at a time, and a file system that has no locks is named.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import lock_file
from contracts.ledger import LedgerWriter
from contracts.modelopt import ModelOptStore, write_modelopt
from contracts.sample_file import decode_states, encode_int4
from contracts.store import Manifest, Store, StoredSample, find_token

ID = "0123456789abcdef0123456789abcdef-0"


def make_sample() -> StoredSample:
    generator = torch.Generator().manual_seed(0)
    return StoredSample(
        input_ids=torch.tensor([5, 6, 7], dtype=torch.int32),
        loss_mask=torch.tensor([False, True, True]),
        hidden_states=torch.randn(3, 4, generator=generator),
        aux_hidden_states=torch.randn(3, 8, generator=generator),
        metadata={"conversation_id": ID[:-2], "thinking_mode": "enabled"},
    )


def test_a_sample_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store, sample = Store(tmp_path), make_sample()
    entry = store.write_sample(ID, sample)
    found = store.read_sample(ID)
    for name in ("input_ids", "loss_mask", "hidden_states", "aux_hidden_states"):
        assert torch.equal(getattr(found, name), getattr(sample, name))
    assert found.metadata == sample.metadata
    assert store.sample_path(ID).parent.name == "01"
    store.check_file(ID, entry)


@pytest.mark.parametrize("sample_id", ["../../etc/passwd-0", "a/b-0", "0123-0", f"{ID}\x00", ID.upper(), f"{ID}/x"])
def test_an_id_that_dump_did_not_make_never_becomes_a_path(tmp_path: Path, sample_id: str) -> None:
    with pytest.raises(ValueError, match="sample id"):
        Store(tmp_path).sample_path(sample_id)


def test_a_torn_or_changed_file_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.write_sample(ID, make_sample())
    path = store.sample_path(ID)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="unreadable sample"):
        store.read_sample(ID)
    with pytest.raises(UserError, match="as in the ledger"):
        store.check_file(ID, entry)


def test_a_folder_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: found no such file"):
        Store(tmp_path).read_manifest()


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        target="t", target_fingerprint="f", quantization="none", layer_ids=[1, 2], num_layers=4, hidden_size=4,
        final_norm="rms", tokenizer="", template="", engine="none", engine_version="", dtype="float32",
    )  # fmt: skip


def test_a_claim_waits_for_another_shards(tmp_path: Path, manifest: Manifest) -> None:
    with (tmp_path / "claim.lock").open("a") as held:
        assert lock_file(held, tmp_path, wait=True)
        with (tmp_path / "claim.lock").open("a") as other:
            assert not lock_file(other, tmp_path, wait=False)
        claim = threading.Thread(target=Store(tmp_path).claim, args=(manifest,))
        claim.start()
        claim.join(timeout=0.3)
        assert not (tmp_path / "manifest.json").exists()
    claim.join()
    assert Store(tmp_path).read_manifest() == manifest


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_claim_on_a_file_system_without_locks_is_refused_by_that_name(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"a file system that refuses file locks \(.*Lustre: -o flock"):
        Store(tmp_path).claim(manifest)
    assert not (tmp_path / "manifest.json").exists()


def test_a_token_is_found_in_the_first_sample_that_holds_it_in_our_layout_and_in_modelopts(tmp_path: Path) -> None:
    store, foreign = Store(tmp_path / "ours"), ModelOptStore(tmp_path / "theirs", [0, 1], 4)
    foreign.folder.mkdir()
    ledger = LedgerWriter(store.ledger_path)
    for number in range(40):
        sample_id, sample = f"{number:032x}-0", make_sample()
        sample.input_ids[1] = 100 if number in (23, 31) else number
        ledger.append([{"id": sample_id, "status": "done", "tokens": 3, **store.write_sample(sample_id, sample)}])
        write_modelopt(foreign.sample_path(sample_id), sample_id, sample)
    ids = store.sample_ids()
    for opened in (store, foreign):
        assert find_token(opened, 100, ids) == f"{23:032x}-0"
        assert find_token(opened, 101, ids) is None
        assert find_token(opened, 100, ids[:23]) is None
    store.sample_path(f"{5:032x}-0").write_bytes(b"torn")
    with pytest.raises(UserError, match="unreadable sample"):
        find_token(store, 101, ids)


def test_four_bits_are_off_by_half_a_level_of_their_block_at_most_whatever_other_blocks_hold() -> None:
    states = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    states[:, 64] *= 1e5  # a massive activation spoils its own block alone
    states[0] = 0.0
    coded, scale = encode_int4(states)
    assert (coded.dtype, coded.shape, scale.dtype, scale.shape) == (torch.uint8, (40, 64), torch.float16, (40, 4))
    found = decode_states(coded, scale).float()
    level = scale.float().repeat_interleave(32, dim=1)
    assert bool(((found - states).abs() <= 0.51 * level + 0.01 * states.abs()).all())
    assert torch.equal(found[0], torch.zeros(128))
    others = [column for column in range(128) if not 64 <= column < 96]
    assert float((found - states)[:, others].norm() / states[:, others].norm()) < 0.12

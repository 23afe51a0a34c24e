"""Claims about tokens shown one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.errors import UserError
from target.view import Decoder


def write_bytes(folder: Path) -> Path:
    """A tokenizer whose tokens are bytes, as GPT-2's begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_sentencepiece(folder: Path) -> Path:
    """A tokenizer with the decoder of Llama 2's: it strips the space before a text's first token."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = {**bytes_, "▁": 256, "a": 257, "▁a": 258, "▁model": 259, "s": 260}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_bytes_of_one_character_are_one_piece_within_the_loss_or_outside(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_bytes(tmp_path) / "tokenizer.json"))
    ids = tokenizer.encode("né😀").ids
    decoder = Decoder(tmp_path)
    pieces = list(decoder.split(ids, [False] * len(ids)))
    assert [piece.text for piece in pieces] == ["n", "é", "😀"]
    assert [piece.start for piece in pieces] == [0, 1, 3]
    assert [token for piece in pieces for token in piece.token_ids] == ids
    cut = list(decoder.split(ids, [False] * 4 + [True] * 3))  # the loss begins inside the last character
    assert [piece.num_tokens for piece in cut] == [1, 2, 1, 3]
    assert decoder.text(ids[0]) == "n"
    assert decoder.text(ids[1]) == "\ufffd"


def test_special_tokens_are_known(tmp_path: Path) -> None:
    decoder = Decoder(write_bytes(tmp_path))
    assert [decoder.text(token_id) for token_id in decoder.special_ids] == ["<|end|>"]


def test_spaces_of_sentencepiece_are_kept(tmp_path: Path) -> None:
    decoder = Decoder(write_sentencepiece(tmp_path))
    pieces = decoder.split([258, 259, 260, 0xC3, 0xA9, 256], [True] * 6)
    assert [piece.text for piece in pieces] == [" a", " model", "s", "é", " "]


def test_a_target_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no tokenizer\.json"):
        Decoder(tmp_path)

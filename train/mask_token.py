"""The mask token: a row of the embedding that the tokenizer never produces."""

from __future__ import annotations

from contracts.errors import UserError
from contracts.files import read_json
from contracts.target import Target


def choose_mask_token(target: Target, wanted: int | None) -> int:
    """The recipe's mask token, or the first row above the tokenizer's highest id; checked either way.

    Raises UserError when it has no embedding row or when the tokenizer produces it.
    """
    tokenizer = read_json(target.path / "tokenizer.json", "the target's tokenizer")
    vocabulary = tokenizer["model"]["vocab"]
    used = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    used |= {token["id"] for token in tokenizer.get("added_tokens", [])}
    token = max(used) + 1 if wanted is None else wanted
    if token in used or not 0 <= token < target.vocab_size:
        raise UserError(
            f"{target.path} (mask token {token})",
            found="a token of the tokenizer" if token in used else f"no row in {target.vocab_size} embedding rows",
            expected="a free row of the embedding",
            fix=f"Set target.mask_token_id to an unused id below {target.vocab_size}.",
        )
    return token

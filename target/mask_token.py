"""Choose the mask token, an embedding row that the tokenizer never produces."""

from __future__ import annotations

from common.errors import UserError
from common.files import read_json
from target.target import Target


def choose_mask_token(target: Target, wanted: int | None) -> int:
    """Return the recipe's mask token, or the first row above the tokenizer's highest id.

    Raises UserError if it has no embedding row or the tokenizer produces it.
    """
    used = used_token_ids(target)
    token = max(used) + 1 if wanted is None else wanted
    if token in used or not 0 <= token < target.vocab_size:
        raise UserError(
            f"target.mask_token_id {token} ({target.path})",
            found="a token of the tokenizer" if token in used else f"no row in {target.vocab_size} embedding rows",
            expected="a free row of the embedding",
            fix=f"Set target.mask_token_id to an unused id below {target.vocab_size}.",
        )
    return token


def used_token_ids(target: Target) -> set[int]:
    """Return the ids that the tokenizer can produce; without its files, up to `facts.highest_token_id`."""
    if target.facts is not None and not target.is_here:
        return set(range(target.facts.highest_token_id + 1))
    tokenizer = read_json(target.path / "tokenizer.json", "the target's tokenizer")
    vocabulary = tokenizer["model"]["vocab"]
    used = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    return used | {token["id"] for token in tokenizer.get("added_tokens", [])}

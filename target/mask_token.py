"""Choose the mask token, an embedding row that never occurs in the data.

Where the embedding has rows that no token has (free rows), it is one of them. Where every row has a token (Llama 3,
SmolLM2), it is a special token that neither the chat template nor the target's configs use.

Reads: tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and the chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from target.section import TargetSection
from target.target import Target
from target.templates import render_probes, rendering_template
from target.thinking import thinking_tags_of

RESERVED = re.compile(r"reserved|unused|extra_(id_)?\d|(placeholder|dummy|special|control)_?\d", re.IGNORECASE)
"""Names of tokens without a meaning: `<|reserved_special_token_7|>`, `<unused7>`, `<extra_id_7>`, `<SPECIAL_7>`."""


@dataclass(frozen=True)
class Tokens:
    """The ids of a tokenizer's tokens, and its special tokens by id.

    `special` has the added tokens that are marked as special or have a reserved name (Gemma's `<unused7>` is not
    marked). It is None without the target's files: then `ids` goes up to `facts.highest_token_id`.
    """

    ids: frozenset[int]
    special: Mapping[int, str] | None

    @classmethod
    def of(cls, target: Target) -> Tokens:
        """Read a target's tokens. Raises UserError without tokenizer.json."""
        if target.facts is not None and not target.is_here:
            return cls(frozenset(range(target.facts.highest_token_id + 1)), None)
        tokenizer = read_json(target.path / "tokenizer.json", "the target's tokenizer")
        vocabulary = tokenizer["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        # transformers adds the tokens of tokenizer_config.json that tokenizer.json lacks.
        decoder = _read_optional(target.path / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added = {int(id_): token for id_, token in decoder.items()}
        added |= {token["id"]: token for token in tokenizer.get("added_tokens") or []}
        special = {
            id_: str(token["content"])
            for id_, token in added.items()
            if token.get("special") or RESERVED.search(token["content"])
        }
        return cls(frozenset([*ids, *added]), special)

    def free_rows(self, num_rows: int) -> list[int]:
        """Return the rows that no token has, in the order in which they are chosen.

        Those above the tokenizer's highest id come first, then gaps among its ids from the last one on.
        """
        highest = max(self.ids)
        gaps = [row for row in range(min(highest, num_rows) - 1, -1, -1) if row not in self.ids]
        return [*range(highest + 1, num_rows), *gaps]


def choose_mask_token(section: TargetSection, target: Target) -> int:
    """Return the recipe's mask token, or the default one: see `find_mask_token`.

    Raises UserError if the recipe's cannot be used, or if the target has none.
    """
    token = find_mask_token(section, target)
    if token is None:
        raise UserError(
            f"target.mask_token_id ({target.path})",
            found=f"a token in each of {target.vocab_size} embedding rows, and no special token without a use",
            expected="a free row of the embedding, or a special token that the chat template never renders",
            fix="Use a draft method without a mask token, or add a row to the target's embedding and lm_head.",
        )
    return token


def find_mask_token(section: TargetSection, target: Target) -> int | None:
    """Return the recipe's mask token, or the default one; None if the target has none.

    The default is the first free row, else the last reserved special token, else the last special token without a use.
    Raises UserError for a recipe's mask token that cannot be used, and where the choice needs files that are not here.
    """
    tokens = Tokens.of(target)
    free = tokens.free_rows(target.vocab_size)
    if section.mask_token_id is not None:
        _refuse_used(section, target, tokens, free)
        return section.mask_token_id
    if free:
        return free[0]
    if tokens.special is None:
        raise UserError(
            "target.mask_token_id",
            found=f"none, and a token in each of the {target.vocab_size} rows that target.facts names",
            expected="a special token that never occurs; choosing one needs the target's tokenizer",
            fix=f"Set target.mask_token_id, or run this where {target.path} is.",
        )
    uses = find_uses(section, target, tokens.special)
    unused = [id_ for id_ in tokens.special if id_ < target.vocab_size and id_ not in uses]
    return max([id_ for id_ in unused if RESERVED.search(tokens.special[id_])] or unused, default=None)


def explain_mask_token(section: TargetSection, target: Target) -> tuple[int, str]:
    """Return the mask token, and why it is one. Raises: see `choose_mask_token`."""
    token, tokens = choose_mask_token(section, target), Tokens.of(target)
    if token not in tokens.ids and tokens.special is None:
        return token, f"a free row: target.facts.highest_token_id is {max(tokens.ids)}"
    if token not in tokens.ids:
        return token, "a free row: no token of the tokenizer has it"
    if tokens.special is None:
        return token, f"not checked without the tokenizer of {target.path}"
    kind = "a reserved token" if RESERVED.search(tokens.special[token]) else "a special token"
    full = "" if tokens.free_rows(target.vocab_size) else "; every row of the embedding has a token"
    return token, f"{tokens.special[token]!r}, {kind} that the chat template never renders{full}"


def find_uses(section: TargetSection, target: Target, special: Mapping[int, str]) -> dict[int, str]:
    """Return the special tokens that the target uses, each with its use in words."""
    by_id, by_content = dict(_ids_in_configs(target)), dict(_contents_in_configs(target))
    has_template = target.find_chat_template() is not None or section.training_template is not None
    template = rendering_template(section, target) if has_template else ""
    rendered = list(render_probes(section, template))
    tags = thinking_tags_of(section, target) or ()
    uses = {}
    for id_, content in special.items():
        if name := by_id.get(id_) or by_content.get(content):
            uses[id_] = f"the target's {name}"
        elif any(content in tag for tag in tags):
            uses[id_] = "part of target.thinking_tags"
        elif content in template or any(content in text for text in rendered):
            uses[id_] = "which the chat template renders"
    return uses


def used_token_ids(target: Target) -> frozenset[int]:
    """Return the ids of the tokenizer's tokens; without its files, up to `facts.highest_token_id`."""
    return Tokens.of(target).ids


def _refuse_used(section: TargetSection, target: Target, tokens: Tokens, free: list[int]) -> None:
    """Raise UserError if the recipe's mask token has no row or may occur in the data."""
    token, special = section.mask_token_id, tokens.special
    assert token is not None
    if not 0 <= token < target.vocab_size:
        found = f"no row in {target.vocab_size} embedding rows"
    elif token not in tokens.ids or (special is None and not free):
        return  # of a full embedding, the stage that reads the tokenizer checks it
    elif special is None:
        found = "a token of the tokenizer"
    elif token not in special:
        found = "a token of the tokenizer that is not special"
    elif use := find_uses(section, target, special).get(token):
        found = f"{special[token]!r}, {use}"
    else:
        return
    free_ids = f", such as {free[0]}" if free else ""
    raise UserError(
        f"target.mask_token_id {token} ({target.path})",
        found=found,
        expected=f"a free row of the embedding{free_ids}, or a special token that the chat template never renders",
        fix="Correct it, or leave it out: the default is chosen from these.",
    )


def _ids_in_configs(target: Target) -> Iterator[tuple[int, str]]:
    """Yield the token ids that config.json and generation_config.json name, with their keys."""
    for config in (target.config, _read_optional(target.path / "generation_config.json")):
        for key, value in config.items():
            if re.search(r"_token_(id|ids|index)$", key) and key != "mask_token_id":
                for id_ in value if isinstance(value, list) else [value]:
                    if isinstance(id_, int):
                        yield id_, key


def _contents_in_configs(target: Target) -> Iterator[tuple[str, str]]:
    """Yield the tokens that the tokenizer's configs give a role (bos_token, image_token), with their keys."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = _read_optional(target.path / name)
        extra = config.get("extra_special_tokens")
        for key, value in [*config.items(), *(extra.items() if isinstance(extra, dict) else [])]:
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and key != "mask_token" and isinstance(content, str):
                yield content, key


def _read_optional(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

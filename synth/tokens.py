"""Refuse replies whose tokens no draft may learn: the mask token, and ids that no token of the tokenizer has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from target.mask_token import Tokens, find_mask_token
from target.section import TargetSection
from target.target import Target


class UnusableTokensError(Exception):
    """A reply, or its prompt, has tokens that no draft may learn; the message says which."""


@dataclass(frozen=True)
class TokenCheck:
    """The mask token and the tokenizer's ids. Both are None without tokenizer.json; then nothing is refused.

    The mask token is the target's, whatever the draft method: the conversations then serve every method.
    """

    mask_token: int | None
    ids: frozenset[int] | None

    @classmethod
    def of(cls, section: TargetSection, target: Target) -> TokenCheck:
        """Read the tokenizer. Raises UserError if `target.mask_token_id` cannot be used."""
        if not target.is_here:
            return cls(None, None)
        return cls(find_mask_token(section, target), Tokens.of(target).ids)

    def settings(self) -> dict[str, int]:
        """Return the mask token if prompts can contain it: then another one would change the output."""
        if self.mask_token is None or self.ids is None or self.mask_token not in self.ids:
            return {}
        return {"mask_token_id": self.mask_token}

    def refuse(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> None:
        """Raise UnusableTokensError if a prompt or its reply cannot be used.

        A target has more embedding rows than tokens if they were padded. It can generate such a row, which is no text.
        """
        if self.ids is not None and (unknown := sorted(set(reply_ids) - self.ids)):
            raise UnusableTokensError(f"the target generated {unknown[0]}, a row that no token of the tokenizer has")
        for name, ids in (("a prompt", prompt_ids), ("a reply", reply_ids)):
            if self.mask_token is not None and self.mask_token in ids:
                raise UnusableTokensError(f"{name} contains the mask token {self.mask_token}, which must never occur")

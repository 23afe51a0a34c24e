"""Find free rows of the lm_head, which no token has, that the target may generate.

Reads: the free rows above the tokenizer's ids, and 64 blocks of the others. Norms are only a hint: a long row may point
away from all states. `synth generate` filters the replies in which the target did generate such a row.
"""

from __future__ import annotations

from target.mask_token import Tokens
from target.target import Target

BLOCK_ROWS = 64
NUM_BLOCKS = 64
MAX_FREE_ROWS = 4096


def note_free_rows(target: Target) -> str:
    """Return how many free rows are longer than the median row of a token; "" if none is, or without the weights."""
    if not (target.is_here and target.has_weights):
        return ""
    # Imported here: it takes two seconds, and `recipe check` without the weights does not need it.
    import torch

    from target.head import read_norms

    first = max(Tokens.of(target).ids) + 1
    free = range(first, min(target.vocab_size, first + MAX_FREE_ROWS))
    starts = range(0, first, BLOCK_ROWS * max(1, first // (BLOCK_ROWS * NUM_BLOCKS)))
    norms = [read_norms(target, rows) for rows in (free, *(range(s, min(s + BLOCK_ROWS, first)) for s in starts))]
    read = [part for part in norms if part is not None]
    if not free or len(read) < len(norms):
        return ""
    num_long = int((read[0] > torch.cat(read[1:]).median()).sum())
    if not num_long:
        return ""
    return (
        f"{num_long} of the {len(free)} rows from {first} on, which no token has, are longer in the lm_head than the "
        "median row of a token: the target may generate them. `synth generate` filters and counts such replies."
    )

"""Attention over blocks with FlexAttention, for GPUs: block masks that are computed from the anchors, not evaluated.

FlexAttention works on tiles of 128 queries and 128 keys. It skips tiles that no query sees, and applies the mask only
in tiles where some pairs are excluded. `plan_tiles` finds both kinds on the CPU, from sorted anchors; evaluating the
mask for all pairs of queries and keys would take longer than the attention.

Keys are the packed context, then the keys of all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from drafts.attention_rule import WHOLE, AttentionRule
from drafts.unevaluated import Unevaluated

TILE = 128
TENSORS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
"""A BlockMask's tensors, in the order of `FlexLayout.tiles`."""


@dataclass(frozen=True)
class FlexLayout:
    """What FlexAttention needs of a layout.

    Block a sees the context rows first_rows[a] <= row < anchor_rows[a] that are in the windows of its queries. `tiles`:
    by number of queries of a block, the eight tensors of a BlockMask; `masks`: their BlockMasks, from `make_masks`;
    `pairs`: the number of pairs of a query and a key that it sees. Sizes that differ between batches are tensors, so
    that no batch recompiles the kernel.

    Shapes: first_rows and anchor_rows (A,); num_context ().
    """

    first_rows: torch.Tensor
    anchor_rows: torch.Tensor
    num_context: torch.Tensor
    block_size: int
    seq_lengths: dict[int, tuple[int, int]]
    tiles: dict[int, list[torch.Tensor]]
    pairs: dict[int, int]
    rule: AttentionRule = WHOLE
    masks: dict[int, BlockMask] = field(default_factory=dict, init=False, repr=False, compare=False)

    def make_masks(self) -> None:
        """Make the masks, once a step and outside of the compiled layers."""
        for num_queries, tensors in self.tiles.items():
            tiles: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
            self.masks[num_queries] = BlockMask(
                self.seq_lengths[num_queries], **tiles, BLOCK_SIZE=(TILE, TILE), mask_mod=self._make_rule(num_queries)
            )

    def _make_rule(self, num_queries: int) -> Callable[..., torch.Tensor]:
        """Return the rule for one query and one key."""
        num_context, block_size = self.num_context, self.block_size
        first_rows, anchor_rows, (causal, window) = self.first_rows, self.anchor_rows, self.rule

        def sees(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            block = query // num_queries
            in_context = (key < num_context) & (key >= first_rows[block]) & (key < anchor_rows[block])
            own = (key >= num_context) & ((key - num_context) // block_size == block)
            place = query % num_queries + block_size - num_queries
            if causal:
                own = own & ((key - num_context) % block_size <= place)
            if window is not None:
                in_context = in_context & (anchor_rows[block] + place - key < window)
            return in_context | own

        return sees


def plan_flex(
    first_rows: torch.Tensor,
    anchor_rows: torch.Tensor,
    num_context: int,
    block_size: int,
    num_queries: Sequence[int],
    *,
    rule: AttentionRule = WHOLE,
) -> FlexLayout:
    """Plan the tiles of each number of queries in `num_queries`. Shapes: first_rows and anchor_rows (A,)."""
    num_blocks, tiles, pairs = len(anchor_rows), {}, {}
    for number in num_queries:
        planned = plan_tiles(first_rows, anchor_rows, num_context, block_size, number, rule.window)
        tiles[number] = _to_block_mask(*planned)
        oldest = _oldest_rows(first_rows, anchor_rows, block_size, number, rule.window)
        unseen = num_blocks * (number * (number - 1) // 2 if rule.causal else 0)
        pairs[number] = int((anchor_rows[:, None] - oldest + block_size).sum()) - unseen
    num_keys = num_context + num_blocks * block_size
    seq_lengths = {number: (num_blocks * number, num_keys) for number in num_queries}
    return FlexLayout(first_rows, anchor_rows, torch.tensor(num_context), block_size, seq_lengths, tiles, pairs, rule)


def _oldest_rows(
    first_rows: torch.Tensor, anchor_rows: torch.Tensor, block_size: int, num_queries: int, window: int | None
) -> torch.Tensor:
    """Return the first context row that each query of a block may see, or its anchor's: (A,) -> (A, num_queries)."""
    oldest = first_rows[:, None].expand(-1, num_queries)
    if window is None:
        return oldest
    places = torch.arange(block_size - num_queries, block_size)
    return torch.maximum(oldest, anchor_rows[:, None] + places - window + 1).minimum(anchor_rows[:, None])


def plan_tiles(
    first_rows: torch.Tensor,
    anchor_rows: torch.Tensor,
    num_context: int,
    block_size: int,
    num_queries: int,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tiles hold visible pairs and excluded ones, and which hold visible pairs alone.

    A tile may count as the first kind though no pair in it is visible: then the mask excludes them all.

    Shapes: first_rows and anchor_rows (A,) -> both (tiles of A*num_queries, tiles of num_context + A*block_size).
    """
    oldest = _oldest_rows(first_rows, anchor_rows, block_size, num_queries, window)
    num_blocks = len(anchor_rows)
    starts = torch.arange(0, num_blocks * num_queries, TILE)
    ends = (starts + TILE).clamp(max=num_blocks * num_queries)
    low, high = starts // num_queries, (ends - 1) // num_queries  # the first and last block of each row of tiles
    left = torch.arange(0, num_context + num_blocks * block_size, TILE)[None]
    right = left + TILE

    def of_rows(values: torch.Tensor, largest: bool) -> torch.Tensor:
        parts = [values[a : b + 1] for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        return torch.stack([part.max() if largest else part.min() for part in parts])[:, None]

    some_context = (left < of_rows(anchor_rows, True)) & (right > of_rows(oldest[:, 0], False))
    whole_context = (left >= of_rows(oldest[:, -1], True)) & (right <= of_rows(anchor_rows, False))
    own_left = num_context + low[:, None] * block_size
    own_right = num_context + (high[:, None] + 1) * block_size
    own = (left < own_right) & (right > own_left)
    return (some_context | own) & ~whole_context, whole_context


def _to_block_mask(partial: torch.Tensor, full: torch.Tensor) -> list[torch.Tensor]:
    """Return counts and indices of partial and full tiles by query, then by key, as BlockMask takes them."""
    by_query = [part for dense in (partial, full) for part in _to_indices(dense)]
    by_key = [part for dense in (partial, full) for part in _to_indices(dense.T)]
    return by_query + by_key


def _to_indices(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tiles are marked in each row, and the columns, marked ones first: (1, 1, R), (1, 1, R, C)."""
    columns = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    # A clone, as `contiguous` keeps odd strides of a size of 1, and other strides recompile the kernel.
    columns = columns.int().clone(memory_format=torch.contiguous_format)
    return dense.sum(-1).int()[None, None], columns[None, None]


def attend_flex(
    query: torch.Tensor,
    pairs: tuple[torch.Tensor, ...],
    layout: FlexLayout,
    attention: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return what `drafts.attention.attend` does. `attention`: the kernel; default: FlexAttention, compiled.

    Shapes: see `attend` and `KeyValues`.
    """
    context_key, context_value, block_key, block_value = pairs
    key = torch.cat([context_key, block_key.flatten(0, 1)]).transpose(0, 1)[None]
    value = torch.cat([context_value, block_value.flatten(0, 1)]).transpose(0, 1)[None]
    by_head = query.flatten(0, 1).transpose(0, 1)[None]
    if query.device.type == "meta":
        output: torch.Tensor = Unevaluated.apply(by_head, key, value, layout.pairs[query.shape[1]])
    else:
        # Within a compiled layer, the layer's compilation includes the kernel.
        kernel = attention or (flex_attention if torch.compiler.is_compiling() else _compiled_flex())
        output = kernel(by_head, key, value, block_mask=layout.masks[query.shape[1]], enable_gqa=True)
    return output[0].transpose(0, 1).unflatten(0, query.shape[:2])


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled

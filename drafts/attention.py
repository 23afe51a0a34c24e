"""Attention of a block's queries over the context before its anchor and over the block itself.

An `AttentionRule` says how much of both a query sees.

On CPUs, blocks are sorted by anchor and computed in groups, each against the prefix of its last anchor, as matrix
products with a hand-written gradient. Only the columns between the first and the last anchor of a group are masked. On
GPUs FlexAttention computes the same from a block-sparse mask.

Shapes: A blocks of B queries, T context tokens, KV key-value heads with R query heads each, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drafts.attention_rule import WHOLE, AttentionRule
from drafts.threads import share_out

if TYPE_CHECKING:
    from drafts.flex import FlexLayout

QUERIES_A_GROUP = 128
ALIGNMENT = 16
"""Rows of scores are padded to a multiple of this many elements, those of a vector register."""
KEPT_BYTES = 256 << 20
"""Attention weights of one layer up to this size are kept for the backward pass; larger ones are recomputed."""


@dataclass(frozen=True)
class Group:
    """Blocks of one document that are computed together, and the context that they share.

    `hidden` (n, w) is True where a block must not see one of the last w columns of the context. `early` (n, B, w') is
    True where the window of a block's place does not reach one of the first w' columns. The context may end beyond the
    last anchor, even in the next document, because of `ALIGNMENT`.
    """

    blocks: slice
    context: slice
    hidden: torch.Tensor
    early: torch.Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Which context each block of a batch sees: groups of blocks on CPUs, tiles of FlexAttention elsewhere.

    Shapes: anchor_rows (A,), rows of the anchors in the packed context.
    """

    anchor_rows: torch.Tensor
    groups: list[Group]
    flex: FlexLayout | None
    rule: AttentionRule = WHOLE

    def make_masks(self) -> None:
        """Make FlexAttention's masks, once a step and outside of the compiled layers."""
        if self.flex is not None:
            self.flex.make_masks()


def lay_out(
    lengths: Sequence[int],
    anchors: Sequence[torch.Tensor],
    block_size: int,
    device: torch.device,
    num_queries: Sequence[int] = (),
    *,
    rule: AttentionRule = WHOLE,
) -> Layout:
    """Lay out blocks at `anchors[i]`, ascending positions in document i of `lengths[i]` tokens.

    Runs on the CPU and leaves its tensors there; `device` is that of the attention. Blocks have `block_size` keys of
    their own. `num_queries`: the numbers of queries of a block that attention will be asked for, by default as many as
    keys; fewer are those of the block's last places.
    """
    offsets = [0, *accumulate(lengths)]
    anchor_rows = torch.cat([offset + positions for offset, positions in zip(offsets, anchors, strict=False)])
    queries = num_queries or (block_size,)
    if device.type == "cpu":
        groups = plan_groups(lengths, anchors, block_size, queries[0], rule.window)
        return Layout(anchor_rows, groups, None, rule)
    from drafts.flex import plan_flex  # FlexAttention takes 80 MiB that CPUs do without

    first_rows = torch.cat([torch.full((len(p),), offset) for offset, p in zip(offsets, anchors, strict=False)])
    flex = plan_flex(first_rows, anchor_rows, offsets[-1], block_size, queries, rule=rule)
    return Layout(anchor_rows, [], flex, rule)


def plan_groups(
    lengths: Sequence[int],
    anchors: Sequence[torch.Tensor],
    block_size: int,
    num_queries: int,
    window: int | None = None,
) -> list[Group]:
    """Group the blocks at `anchors[i]`, ascending positions in document i of `lengths[i]` tokens.

    A group's context begins where the window of its first query does.
    """
    groups, first = [], 0
    size = max(1, QUERIES_A_GROUP // num_queries)
    for offset, positions in zip([0, *accumulate(lengths)], anchors, strict=False):
        for members in positions.split(size) if len(positions) else ():
            low, high = int(members[0]), int(members[-1])
            start = 0 if window is None else max(0, low + block_size - num_queries - window + 1)
            high += -(high - start + block_size) % ALIGNMENT
            hidden = torch.arange(low, high)[None] >= members[:, None]
            early = None if window is None else _plan_early(members, start, high, block_size, window)
            context = slice(offset + start, offset + high)
            groups.append(Group(slice(first, first + len(members)), context, hidden, early))
            first += len(members)
    return groups


def _plan_early(members: torch.Tensor, start: int, end: int, block_size: int, window: int) -> torch.Tensor:
    """Return `Group.early` for blocks at positions `members`, whose context is `start` to `end`."""
    oldest = members[:, None] + torch.arange(block_size) - window + 1  # the first key in the window of each place
    columns = torch.arange(start, max(start, min(end, int(oldest.max()))))
    return columns < oldest[..., None]


class KeyValues(NamedTuple):
    """Keys and values of the packed context (T, KV, D) and of the blocks (A, B, KV, D)."""

    context_key: torch.Tensor
    context_value: torch.Tensor
    block_key: torch.Tensor
    block_value: torch.Tensor


def attend(query: torch.Tensor, pairs: KeyValues, layout: Layout) -> torch.Tensor:
    """Return the attention of each block's queries, with the kernel for the query's device.

    Shapes: query (A, B', KV*R, D) -> (A, B', KV*R, D); B' <= B queries a block.
    """
    if layout.flex is not None:
        from drafts.flex import attend_flex

        return attend_flex(query, pairs, layout.flex)
    on_cpu = _uncompiled() if torch.compiler.is_compiling() else _attend_on_cpu
    return on_cpu(query, *pairs, layout)


def _attend_on_cpu(*arguments: Any) -> torch.Tensor:
    output: torch.Tensor = _BlockAttention.apply(*arguments)
    return output


@cache
def _uncompiled() -> Callable[..., torch.Tensor]:
    # Not as a decorator: it loads torch's compiler, 100 MiB and most of a second, also where nothing is compiled.
    return torch.compiler.disable(_attend_on_cpu)


class _BlockAttention(torch.autograd.Function):
    """Softmax over `[context | own block]`, group by group; threads share the groups.

    The context's keys are padded by B columns, so one product fills the whole score buffer; the block's own scores then
    overwrite its last B columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        context_key: torch.Tensor,
        context_value: torch.Tensor,
        block_key: torch.Tensor,
        block_value: torch.Tensor,
        layout: Layout,
    ) -> torch.Tensor:
        (_, num_queries, num_heads, size), kv_heads = query.shape, context_key.shape[1]
        width, rows = block_key.shape[1], num_heads // kv_heads * num_queries
        groups, scale = layout.groups, size**-0.5
        later = _later_keys(num_queries, width, query.device) if layout.rule.causal else None
        own = _Own(num_queries, later)
        # Heads first: (KV, A, R*B', D); the scale goes into the queries once.
        q = _heads_first(query, kv_heads).mul_(scale)
        k, v = _pad(context_key, width), _pad(context_value, width)
        bk, bv = block_key.permute(2, 0, 1, 3).contiguous(), block_value.permute(2, 0, 1, 3).contiguous()
        output = torch.empty_like(q)
        shapes = [(kv_heads, _count(g.blocks) * rows, _count(g.context) + width) for g in groups]
        memory = _take_memory(q, shapes) if any(ctx.needs_input_grad) else None

        def work(numbers: Sequence[int]) -> None:
            scratch = _Scratch(q)
            for number in numbers:
                group = groups[number]
                weights = scratch.view(shapes[number]) if memory is None else memory.view(number)
                _weigh(weights, q, k, bk, group, own)
                inside = weights[:, :, -width:].unflatten(1, (-1, rows))
                result = torch.bmm(weights[:, :, :-width], v[:, group.context]).unflatten(1, (-1, rows))
                output[:, group.blocks] = result.add_(inside @ bv[:, group.blocks])

        share_out(work, range(len(groups)))
        ctx.save_for_backward(q, k, v, bk, bv)
        ctx.groups, ctx.scale, ctx.own, ctx.shapes, ctx.memory = groups, scale, own, shapes, memory
        return _heads_last(output, num_queries)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bk, bv = ctx.saved_tensors
        groups: list[Group] = ctx.groups
        memory: _Memory | None = ctx.memory
        width, rows = bk.shape[2], q.shape[2]
        grad = _heads_first(gradients[0], len(k))
        grad_q, grad_bk, grad_bv = torch.empty_like(q), torch.empty_like(bk), torch.empty_like(bv)

        def work(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            # Transposed, (KV, D, T): products of this form are twice as fast.
            grad_k, grad_v = (x.new_zeros((x.shape[0], x.shape[2], x.shape[1])) for x in (k, v))
            scratch, again = _Scratch(q), _Scratch(q)
            for number in numbers:
                group, shape = groups[number], ctx.shapes[number]
                if memory is None:
                    weights = again.view(shape)
                    _weigh(weights, q, k, bk, group, ctx.own)
                else:
                    weights = memory.view(number)
                g_own, q_own = grad[:, group.blocks], q[:, group.blocks]
                g, queries = g_own.flatten(1, 2), q_own.flatten(1, 2)
                own = weights[:, :, -width:].unflatten(1, (-1, rows))
                grad_v[:, :, group.context] += torch.bmm(g.transpose(1, 2), weights[:, :, :-width])
                grad_bv[:, group.blocks] = own.transpose(2, 3) @ g_own
                d = torch.bmm(g, v[:, _padded(group, width)].transpose(1, 2), out=scratch.view(shape))
                d[:, :, -width:].unflatten(1, (-1, rows)).copy_(g_own @ bv[:, group.blocks].transpose(2, 3))
                torch._softmax_backward_data(d, weights, -1, d.dtype, grad_input=d)
                d_own = d[:, :, -width:].unflatten(1, (-1, rows))
                result = torch.bmm(d[:, :, :-width], k[:, group.context]).unflatten(1, (-1, rows))
                grad_q[:, group.blocks] = result.add_(d_own @ bk[:, group.blocks])
                grad_k[:, :, group.context] += torch.bmm(queries.transpose(1, 2), d[:, :, :-width])
                grad_bk[:, group.blocks] = d_own.transpose(2, 3) @ q_own
            return grad_k, grad_v

        (grad_k, grad_v), *others = share_out(work, range(len(groups)))
        for other_k, other_v in others:
            grad_k += other_k
            grad_v += other_v
        if memory is not None:
            memory.give_back()
        length = k.shape[1] - width - ALIGNMENT
        return (
            _heads_last(grad_q.mul_(ctx.scale), ctx.own.num_queries),
            grad_k[..., :length].permute(2, 0, 1),
            grad_v[..., :length].permute(2, 0, 1),
            grad_bk.permute(1, 2, 0, 3),
            grad_bv.permute(1, 2, 0, 3),
            None,
        )


class _Own(NamedTuple):
    """The queries of a block, B', and which keys of the block each must not see, `(B', B)`; None: it sees all."""

    num_queries: int
    later: torch.Tensor | None


class _Scratch:
    """One buffer for the scores of all groups: touching fresh pages takes longer than the products."""

    def __init__(self, like: torch.Tensor) -> None:
        self._flat = like.new_empty(0)

    def view(self, shape: tuple[int, int, int]) -> torch.Tensor:
        size = math.prod(shape)
        if len(self._flat) < size:
            self._flat = self._flat.new_empty(size * 5 // 4)
        return self._flat[:size].view(shape)


_unused: list[torch.Tensor] = []
"""Buffers of layers whose backward pass is over, reused in the next step."""


def forget_buffers() -> None:
    """Free the buffers that are kept for the next step."""
    _unused.clear()


class _Memory:
    """The kept weights of one layer's groups, in one buffer that the next step reuses."""

    def __init__(self, flat: torch.Tensor, shapes: Sequence[tuple[int, int, int]]) -> None:
        self._flat, self._shapes = flat, shapes
        self._starts = [0, *accumulate(math.prod(shape) for shape in shapes)]

    def view(self, number: int) -> torch.Tensor:
        return self._flat[self._starts[number] : self._starts[number + 1]].view(self._shapes[number])

    def give_back(self) -> None:
        _unused.append(self._flat)


def _take_memory(like: torch.Tensor, shapes: Sequence[tuple[int, int, int]]) -> _Memory | None:
    """Return a buffer for the weights of all groups, or None if they exceed `KEPT_BYTES`."""
    size = sum(math.prod(shape) for shape in shapes)
    if size * like.itemsize > KEPT_BYTES:
        return None
    flat = _unused.pop() if _unused else like.new_empty(0)
    if len(flat) < size or flat.dtype != like.dtype:
        flat = like.new_empty(size * 5 // 4)
    return _Memory(flat, shapes)


def _count(part: slice) -> int:
    return int(part.stop - part.start)


def _heads_first(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Copy `(A, B', KV*R, D)` into a new `(KV, A, R*B', D)`."""
    split = x.unflatten(2, (kv_heads, -1)).permute(2, 0, 3, 1, 4)
    return split.clone(memory_format=torch.contiguous_format).flatten(2, 3)


def _heads_last(x: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Rearrange `(KV, A, R*B', D)` to `(A, B', KV*R, D)`."""
    return x.unflatten(2, (-1, num_queries)).permute(1, 3, 0, 2, 4).flatten(2, 3)


def _pad(context: torch.Tensor, width: int) -> torch.Tensor:
    """Copy `(T, KV, D)` into `(KV, T + ALIGNMENT + width, D)`, zero-padded."""
    length, heads, size = context.shape
    padded = context.new_zeros((heads, length + ALIGNMENT + width, size))
    padded[:, :length] = context.transpose(0, 1)
    return padded


def _padded(group: Group, width: int) -> slice:
    return slice(group.context.start, group.context.stop + width)


def _later_keys(num_queries: int, width: int, device: torch.device) -> torch.Tensor:
    """Return which keys of its block each query must not see in causal attention, `(B', B)`."""
    return torch.ones(num_queries, width, dtype=torch.bool, device=device).triu(1 + width - num_queries)


def _weigh(
    weights: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    bk: torch.Tensor,
    group: Group,
    own: _Own,
) -> None:
    """Write a group's attention weights `(KV, n*R*B', m + B)`: over its context, then own keys."""
    width = bk.shape[2]
    queries = q[:, group.blocks]
    torch.bmm(queries.flatten(1, 2), k[:, _padded(group, width)].transpose(1, 2), out=weights)
    by_block = weights.unflatten(1, queries.shape[1:3])
    by_block[..., -width:] = queries @ bk[:, group.blocks].transpose(2, 3)
    if own.later is not None:
        by_block[..., -width:].unflatten(2, (-1, own.num_queries)).masked_fill_(own.later, -torch.inf)
    if group.early is not None and group.early.shape[2]:
        early = group.early[:, None, -own.num_queries :]  # the queries are those of the block's last places
        by_block[..., : early.shape[3]].unflatten(2, (-1, own.num_queries)).masked_fill_(early, -torch.inf)
    masked = group.hidden.shape[1]
    if masked:
        by_block[..., -width - masked : -width].masked_fill_(group.hidden[:, None], -torch.inf)
    torch.softmax(weights, -1, out=weights)

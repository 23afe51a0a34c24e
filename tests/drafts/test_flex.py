"""Claims about attention on GPUs, shown on a CPU: tiles are those of the mask, results those of the products.

torch has no backward pass of FlexAttention on CPUs and its C++ compiler does not know dynamic sizes, so the compiled
layers are traced forward, with the backend `aot_eager`.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from drafts import METHODS, moving
from drafts.attention import KeyValues, attend, lay_out
from drafts.attention_rule import AttentionRule
from drafts.batch import Batch
from drafts.draft import Draft, init_weights
from drafts.flex import TILE, attend_flex, plan_flex, plan_tiles
from target.head import TargetHead

GPU = torch.device("cuda")  # only named: layouts are planned on the CPU
ATTENDS = {
    "dflash": "drafts.block",
    "windows": "drafts.block",
    "eagle3": "drafts.eagle3.model",
    "peagle": "drafts.peagle.model",
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
OWN: dict[str, dict[str, object]] = {
    "dflash": {"num_layers": 2},
    "windows": {"method": "dflash", "num_layers": 3, "sliding_window": 64, "layer_types": KINDS},
    "eagle3": {"ttt_length": 3},
    "peagle": {"num_layers": 3},
}
GRAPHS = [("dflash", 2), ("eagle3", 3), pytest.param("peagle", 3, marks=pytest.mark.long)]
"""Graphs of a method: one for each step; or one for the last layer, the first one if it differs, and the others."""
BLOCK = 8
CASES = [
    ([40, 25], [torch.arange(1, 38, 2), torch.tensor([3, 7, 20])]),
    ([600], [torch.arange(2, 590, 3)]),
    ([300, 7, 500], [torch.arange(1, 290, 5), torch.tensor([2]), torch.tensor([1, 2, 450, 451, 480])]),
    ([130], [torch.tensor([128])]),
]
RULES = [AttentionRule(), AttentionRule(causal=True), AttentionRule(window=9), AttentionRule(causal=True, window=150)]


def visible(
    lengths: list[int], anchors: list[torch.Tensor], block_size: int, num_queries: int, rule: AttentionRule
) -> tuple[torch.Tensor, int]:
    """Return which keys each query sees, pair by pair, and the number of context rows."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    blocks = [(start, start + int(p)) for start, positions in zip(starts, anchors, strict=True) for p in positions]
    context = sum(lengths)
    sees = torch.zeros(len(blocks) * num_queries, context + len(blocks) * block_size, dtype=torch.bool)
    for number, (first, anchor) in enumerate(blocks):
        rows = slice(number * num_queries, (number + 1) * num_queries)
        sees[rows, first:anchor] = True
        if rule.window is not None:
            for query in range(num_queries):
                place = anchor + block_size - num_queries + query
                sees[rows.start + query, : max(0, place - rule.window + 1)] = False
        own = torch.ones(num_queries, block_size, dtype=torch.bool)
        if rule.causal:  # the queries are those of the block's last places
            own = own.tril(block_size - num_queries)
        sees[rows, context + number * block_size : context + (number + 1) * block_size] = own
    return sees, context


@pytest.mark.parametrize(("lengths", "anchors"), CASES)
@pytest.mark.parametrize(("block_size", "num_queries"), [(BLOCK, BLOCK), (BLOCK, BLOCK - 1), (3, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_tiles_hold_what_the_mask_shows_and_are_few(
    lengths: list[int], anchors: list[torch.Tensor], block_size: int, num_queries: int, rule: AttentionRule
) -> None:
    sees, context = visible(lengths, anchors, block_size, num_queries, rule)
    layout = lay_out(lengths, anchors, block_size, GPU, (num_queries,), rule=rule)
    assert layout.flex is not None
    assert layout.flex.pairs[num_queries] == int(sees.sum())
    assert torch.equal(_rule(layout.flex, num_queries, sees.shape), sees)
    first_rows, anchor_rows = layout.flex.first_rows, layout.anchor_rows
    partial, full = plan_tiles(first_rows, anchor_rows, context, block_size, num_queries, rule.window)
    assert not (partial & full).any()
    for row in range(partial.shape[0]):
        for column in range(partial.shape[1]):
            tile = sees[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            if full[row, column]:
                assert tile.shape[1] == TILE
                assert tile.all()
            elif not partial[row, column]:
                assert not tile.any()
    if len(lengths) == 1 and lengths[0] == 600:
        assert full.any() == (rule.window is None)
        assert (partial | full).float().mean() < 0.8


def _rule(flex: object, num_queries: int, shape: torch.Size) -> torch.Tensor:
    flex.make_masks()  # type: ignore[attr-defined]
    sees = flex.masks[num_queries].mask_mod  # type: ignore[attr-defined]
    queries, keys = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None]
    return sees(torch.tensor(0), torch.tensor(0), queries, keys)


@pytest.mark.parametrize(("lengths", "anchors"), CASES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
def test_the_grouped_products_and_their_gradients_are_those_of_masked_attention(
    lengths: list[int],
    anchors: list[torch.Tensor],
    rule: AttentionRule,
    kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drafts.attention.KEPT_BYTES", kept_bytes)
    generator = torch.Generator().manual_seed(0)
    blocks = sum(len(part) for part in anchors)
    layout = lay_out(lengths, anchors, BLOCK, torch.device("cpu"), (BLOCK, BLOCK - 1), rule=rule)
    for num_queries in (BLOCK, BLOCK - 1):
        sees, _ = visible(lengths, anchors, BLOCK, num_queries, rule)
        shapes = [(blocks, num_queries, 4, 8), *[(sum(lengths), 2, 8)] * 2, *[(blocks, BLOCK, 2, 8)] * 2]
        inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        query, *pairs = inputs
        found = attend(query, KeyValues(*pairs), layout)
        key, value = (torch.cat([pairs[i], pairs[i + 2].flatten(0, 1)]).transpose(0, 1) for i in range(2))
        rows = query.flatten(0, 1).transpose(0, 1)
        expected = functional.scaled_dot_product_attention(rows, key, value, attn_mask=sees, enable_gqa=True)
        expected = expected.transpose(0, 1).unflatten(0, (blocks, num_queries))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn(found.shape, generator=generator)
        ours, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("lengths", "anchors"), CASES)
@pytest.mark.parametrize("rule", RULES)
def test_flex_attention_gives_the_same_as_the_grouped_products(
    lengths: list[int], anchors: list[torch.Tensor], rule: AttentionRule
) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = sum(len(part) for part in anchors)
    on_cpu = lay_out(lengths, anchors, BLOCK, torch.device("cpu"), (BLOCK, BLOCK - 1), rule=rule)
    on_gpu = lay_out(lengths, anchors, BLOCK, GPU, (BLOCK, BLOCK - 1), rule=rule)
    assert on_gpu.flex is not None
    on_gpu.make_masks()
    for num_queries in (BLOCK, BLOCK - 1):  # the last layer has no query for the anchor
        query = torch.randn(blocks, num_queries, 4, 8, generator=generator)
        shapes = [(sum(lengths), 2, 8)] * 2 + [(blocks, BLOCK, 2, 8)] * 2
        pairs = KeyValues(*(torch.randn(shape, generator=generator) for shape in shapes))
        expected = attend(query, pairs, on_cpu)
        torch.testing.assert_close(attend_flex(query, pairs, on_gpu.flex, flex_attention), expected)


@pytest.mark.long  # half a minute of C++ compilers
def test_the_compiled_kernel_skips_the_tiles_that_are_not_listed_and_no_others() -> None:
    compiled = torch.compile(flex_attention, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    lengths, anchors = CASES[2]
    blocks = sum(len(part) for part in anchors)
    on_cpu, on_gpu = (lay_out(lengths, anchors, BLOCK, device) for device in (torch.device("cpu"), GPU))
    assert on_gpu.flex is not None
    on_gpu.make_masks()
    query = torch.randn(blocks, BLOCK, 4, 16, generator=generator)
    shapes = [(sum(lengths), 2, 16)] * 2 + [(blocks, BLOCK, 2, 16)] * 2
    pairs = KeyValues(*(torch.randn(shape, generator=generator) for shape in shapes))
    expected = attend(query, pairs, on_cpu)
    with torch.no_grad():
        found = attend_flex(query, pairs, on_gpu.flex, compiled)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        counts = on_gpu.flex.tiles[BLOCK][0]
        counts[..., 1] -= 1  # the last partial tile of the second row of tiles
        found = attend_flex(query, pairs, on_gpu.flex, compiled)
        differs = (found - expected).abs().amax((1, 2, 3)) > 1e-3
        assert differs.any()
        assert not differs[: TILE // BLOCK].any()


def test_a_plan_of_many_chains_takes_no_quadratic_memory() -> None:
    anchors = torch.arange(0, 8000)
    flex = plan_flex(torch.zeros(8000, dtype=torch.long), anchors, 8192, 7, (1,))
    assert sum(tensor.nbytes for tensor in flex.tiles[1]) < 1 << 20


@pytest.mark.parametrize(("method", "graphs"), [*GRAPHS, pytest.param("windows", 3, marks=pytest.mark.long)])
def test_batches_of_other_lengths_compile_nothing_anew(
    method: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = _make_draft(method)
    monkeypatch.setattr(moving, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(
        sys.modules[ATTENDS[method]],
        "lay_out",
        lambda lengths, anchors, size, _, *queries, **kind: lay_out(lengths, anchors, size, GPU, *queries, **kind),
    )
    torch._dynamo.reset()
    counters.clear()
    draft.compile_layers(backend="aot_eager")
    for length in (300, 777):
        _run(draft, length)
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize(("method", "graphs"), GRAPHS)
def test_with_gradients_too_the_layers_around_attention_compile_once(
    method: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = _make_draft(method).requires_grad_(True)
    monkeypatch.setattr(moving, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(
        sys.modules[ATTENDS[method]],
        "attend",
        lambda query, pairs, _: query * pairs.block_key.mean() + pairs.context_value.mean(),
    )
    torch._dynamo.reset()
    counters.clear()
    draft.compile_layers(backend="aot_eager")
    for length in (300, 777):
        _run(draft, length).backward()
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert all(parameter.grad is not None for parameter in draft.parameters())


def test_the_layers_of_gpus_compute_those_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(moving, "is_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        draft = _make_draft("dflash").requires_grad_(True)
        init_weights(draft, 0)
        loss = _run(draft, 100)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in draft.parameters())])
    torch.testing.assert_close(found[0], found[1])


def _run(draft: Draft, length: int) -> torch.Tensor:
    """Return the loss of a batch of one document."""
    generator = torch.Generator().manual_seed(length)
    rows = torch.randn(100, 64, generator=generator)
    head = TargetHead(rows, rows, torch.ones(64), "rms", 1e-6)
    batch = Batch(
        torch.randint(0, 90, (length,), generator=generator),
        torch.arange(length) >= length // 4,
        torch.randn(length, 128, generator=generator),
        torch.randn(length, 64, generator=generator),
        [length],
        [""],
        [length],
    )
    plan = draft.plan(batch)
    return draft(batch, plan, head).loss_sum / plan.num_slots  # type: ignore[no-any-return]


def _make_draft(method: str) -> Draft:
    """Return a small draft without gradients."""
    shared = {
        "hidden_size": 64, "vocab_size": 100, "num_target_layers": 8, "layer_ids": [1, 3], "mask_token_id": 99,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 1024, "yarn": None,
        "target_fingerprint": "", "store": "",
    }  # fmt: skip
    values = {
        "method": method, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
        **OWN[method],
    }  # fmt: skip
    of = METHODS[str(values["method"])]
    section = of.section.model_validate(values)
    return of.build(of.make_config(section, shared), section).requires_grad_(False)

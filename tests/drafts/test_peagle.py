"""Claims about P-EAGLE: it trains and drafts what vLLM's one pass computes, place by place; COD keeps its shares."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from common.errors import UserError
from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.draft import init_weights
from drafts.peagle.config import PEagleConfig, PEagleSection
from drafts.peagle.model import PEagle, draw_depths
from target.head import TargetHead

VOCABULARY, HIDDEN, TOKENS, MASK = 40, 16, 4, 39
DIMS = {
    "num_speculative_tokens": TOKENS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24,
}  # fmt: skip


def make_draft(num_layers: int, **changes: object) -> PEagle:
    section = PEagleSection.model_validate({**DIMS, "num_layers": num_layers, "depth_share": 1.0, **changes})
    config = PEagleConfig.model_validate({
        **{key: value for key, value in section.model_dump().items() if key in PEagleConfig.model_fields},
        "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_target_layers": 6, "layer_ids": [1, 2],
        "mask_token_id": MASK, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "yarn": None, "target_fingerprint": "t", "store": "s",
    })  # fmt: skip
    draft = PEagle(config, section)
    init_weights(draft, seed=3)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # far from the origin, where everything would look alike
    return draft


def make_head() -> TargetHead:
    generator = torch.Generator().manual_seed(9)
    embedding, lm_head = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    return TargetHead(embedding, 0.3 * lm_head, torch.rand(HIDDEN, generator=generator), "rms", 1e-6)


def make_batch(lengths: list[int], seeds: list[int] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    mask = torch.cat([(torch.arange(length) >= 5) & (torch.arange(length) != 9) for length in lengths])
    return Batch(
        torch.randint(0, MASK, (total,), generator=generator), mask,
        torch.randn(total, 2 * HIDDEN, generator=generator), torch.randn(total, HIDDEN, generator=generator),
        lengths, [f"sample-{i}" for i in range(len(lengths))], seeds or list(range(len(lengths))),
    )  # fmt: skip


def part_of(batch: Batch, rows: slice, number: int) -> Batch:
    """Return one document of a pack."""
    return Batch(
        batch.token_ids[rows], batch.loss_mask[rows], batch.aux_hidden_states[rows], batch.hidden_states[rows],
        [rows.stop - rows.start], ["a"], [batch.seeds[number]],
    )  # fmt: skip


def serve(draft: PEagle, tokens: torch.Tensor, aux: torch.Tensor, place: int, head: TargetHead) -> torch.Tensor:
    """Return the states that predict after token `place`, (K, H), from one plain causal pass, as vLLM runs it."""
    ids = torch.cat([tokens[1 : place + 1], torch.full((TOKENS - 1,), MASK)])
    rows = torch.cat([aux[:place], draft.mask_hidden.view(1, -1).expand(TOKENS - 1, -1)])

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)

    def turn(y: torch.Tensor) -> torch.Tensor:
        cos, sin = draft.rope.at(torch.arange(len(y)))
        return y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin

    x = rows @ draft.fc.weight.T
    for number, layer in enumerate(draft.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if number == 0:
            embedded = norm(head.embedding[ids], layer.input_layernorm.weight)
            y = torch.cat([embedded, norm(x, layer.hidden_norm.weight)], dim=-1)
        else:
            y = norm(x, layer.input_layernorm.weight)
        q = turn(attention.q_proj(y).unflatten(-1, (4, -1))).transpose(0, 1)
        k = turn(attention.k_proj(y).unflatten(-1, (2, -1))).transpose(0, 1)
        v = attention.v_proj(y).unflatten(-1, (2, -1)).transpose(0, 1)
        output = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
        x = x + attention.o_proj(output[0].transpose(0, 1).flatten(1))
        y = norm(x, layer.post_attention_layernorm.weight)
        x = x + mlp.down_proj(functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    return norm(x, draft.norm.weight)[-TOKENS:]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_plain_passes_from_every_place(
    num_layers: int, share: float, checkpointing: bool
) -> None:
    draft, head = make_draft(num_layers, depth_share=share, depth_loss_decay=0.5), make_head()
    draft.gradient_checkpointing = checkpointing
    batch = make_batch([16])
    plan = draft.plan(batch)
    found = draft(batch, plan, head)
    places = [5, 6, 7, *range(10, 15)]  # the next token is generated, too; token 9 is not
    assert draft.section is not None
    depths = draw_depths(len(places), draft.section, torch.Generator().manual_seed(0)).tolist()
    assert (set(depths) == {TOKENS - 1}) == (share == 1.0)
    loss, count = torch.zeros(()), 0
    for place, depth in zip(places, depths, strict=True):
        states = serve(draft, batch.token_ids, batch.aux_hidden_states, place, head)
        for k in range(depth + 1):
            label = place + 1 + k
            if label >= 16 or not batch.loss_mask[label]:
                break
            d = (head.lm_head @ states[k]).log_softmax(-1)
            t = head.logits(batch.hidden_states[label - 1]).softmax(-1)
            loss = loss - 0.5**k * (t * d).sum()
            count += 1
    assert int(found.num_slots) == plan.num_slots == count
    torch.testing.assert_close(found.loss_sum, loss, rtol=1e-4, atol=1e-4)
    parameters = list(draft.parameters())
    ours, expected = torch.autograd.grad(found.loss_sum, parameters), torch.autograd.grad(loss, parameters)
    for (name, _), a, b in zip(draft.named_parameters(), ours, expected, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("num_layers", "length", "stride"), [(1, 16, 1), (3, 16, 1), (2, 400, 39)])
def test_drafts_are_those_of_one_plain_pass(num_layers: int, length: int, stride: int) -> None:
    draft, head, batch = make_draft(num_layers).eval(), make_head(), make_batch([length])
    sample = StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {})
    drafted = draft.draft(sample, head).tokens
    for place in [5, 7, *range(10, length - 1, stride)]:
        states = serve(draft, batch.token_ids, batch.aux_hidden_states, place, head)
        taps = draft.taps(sample, head, place)
        torch.testing.assert_close(taps["draft_logits"], states @ head.lm_head.T, rtol=1e-4, atol=1e-4)
        assert drafted[place].tolist() == (states @ head.lm_head.T).argmax(-1).tolist()
        scores = draft.score(sample, head, 0.7)[place]
        labels = batch.token_ids[place + 1 : place + 1 + TOKENS]
        for k, label in enumerate(labels):
            if not batch.loss_mask[place + 1 + k]:
                break
            assert float(scores[k]) == pytest.approx(
                float((head.lm_head @ states[k] / 0.7).softmax(-1)[label]), abs=1e-5
            )
    assert (drafted[[0, 4, 8, 9, length - 1]] == -1).all()  # the prompts' and the last tokens
    assert len({tuple(row) for row in drafted.tolist()}) > 5


@pytest.mark.parametrize("num_layers", [1, 2])
def test_documents_of_a_pack_do_not_see_one_another(num_layers: int) -> None:
    draft, head = make_draft(num_layers, depth_share=0.5), make_head()
    both = make_batch([14, 30], seeds=[4, 7])
    alone = []
    for number, rows in enumerate((slice(0, 14), slice(14, 44))):
        part = part_of(both, rows, number)
        alone.append(draft(part, draft.plan(part), head))
    found = draft(both, draft.plan(both), head)
    assert found.loss_sum.item() == pytest.approx(sum(part.loss_sum.item() for part in alone), rel=1e-5)
    for name in ("right", "total"):
        assert getattr(found, name).tolist() == sum(getattr(part, name) for part in alone).tolist()


def test_half_of_the_cells_that_attention_computes_are_masks_and_each_mask_has_one() -> None:
    rollouts = make_draft(2, depth_share=0.5).plan(make_batch([30, 40]))
    assert [reach.width for reach in rollouts.reaches] == [3, 1]
    for reach in rollouts.reaches:
        assert len(reach.cells) >= 0.5 * len(reach.layout.anchor_rows) * reach.width
        assert len(reach.cells.unique()) == len(reach.cells)
    assert sum(len(reach.cells) for reach in rollouts.reaches) == len(rollouts.mask_positions)
    masks = rollouts.source[rollouts.source >= len(rollouts.rows)]
    assert sorted(masks.tolist()) == list(range(len(rollouts.rows), len(rollouts.rows) + len(rollouts.mask_positions)))


def test_each_depth_keeps_its_share_of_the_places_that_reached_the_depth_before() -> None:
    section = PEagleSection.model_validate({**DIMS, "num_speculative_tokens": 8, "num_anchors": 900})
    depths = draw_depths(1000, section, torch.Generator().manual_seed(1))
    for depth in range(1, 8):
        assert int((depths >= depth).sum()) == math.ceil(max(0.7**depth, 0.2) * 900)  # nested, as it is one number
    early = (depths[:500] > 0).sum() / (depths > 0).sum()
    assert 0.4 < float(early) < 0.6
    other = draw_depths(1000, section, torch.Generator().manual_seed(2))
    assert not torch.equal(depths, other)


def test_accepted_tokens_are_counted_where_no_depth_was_left_out() -> None:
    draft, head, batch = make_draft(1, depth_share=0.5), make_head(), make_batch([60])
    plan = draft.plan(batch)
    found = draft(batch, plan, head)
    everything = make_draft(1, depth_share=1.0)
    complete = everything.plan(batch)
    assert torch.equal(plan.whole, (plan.valid == complete.valid).all(1))
    assert 0 < int(found.num_blocks) == int(plan.whole.sum()) < len(plan.whole)
    assert int(draft(batch, complete, head).num_blocks) == len(plan.whole)


def test_a_document_whose_replies_have_two_tokens_trains_the_first_and_one_without_is_named() -> None:
    draft, head, batch = make_draft(2), make_head(), make_batch([16])
    batch.loss_mask[:] = False
    batch.loss_mask[6:8] = True
    found = draft(batch, draft.plan(batch), head)
    assert found.total.tolist() == [1, 0, 0, 0]
    found.loss_sum.backward()
    assert all(parameter.grad is not None for parameter in draft.parameters())  # as every rank of DDP needs
    batch.loss_mask[6] = False
    with pytest.raises(UserError, match="sample sample-0: found no place to draft from"):
        draft.plan(batch)


def test_a_reduced_vocabulary_ends_rollouts_at_unknown_tokens() -> None:
    draft, head, batch = make_draft(1, draft_vocab_size=10), make_head(), make_batch([20])
    kept = torch.arange(0, VOCABULARY, 4)
    draft.set_vocabulary(kept, head)
    batch.token_ids[10:] = torch.tensor([0, 4, 8, 12, 13, 16, 20, 24, 28, 32])  # 13, at place 14, is unknown
    plan = draft.plan(batch)
    assert plan.valid[3:6].tolist() == [[True] * 3 + [False], [True, True, False, False], [True] + [False] * 3]
    assert plan.labels[3].tolist()[:3] == [1, 2, 3]
    found = draft(batch, plan, head)
    found.loss_sum.backward()
    assert draft.lm_head is not None
    assert draft.lm_head.weight.grad is not None
    sample = StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {})
    drafted = draft.draft(sample, head).tokens
    assert set(drafted[drafted >= 0].tolist()) <= set(kept.tolist())
    taps = draft.taps(sample, head, 11)
    assert taps["draft_logits"].argmax(-1).tolist() == drafted[11].tolist()
    assert taps["vocabulary"].tolist() == kept.tolist()


def test_a_few_samples_are_learned_by_heart() -> None:
    draft, head, batch = make_draft(2, objective="tokens"), make_head(), make_batch([20, 20])
    init_weights(draft, seed=0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        found = draft(batch, draft.plan(batch), head)
        loss = found.loss_sum / found.num_slots
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

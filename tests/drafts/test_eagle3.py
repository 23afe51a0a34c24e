"""Claims about the EAGLE3 draft: its training sees what serving would, chain by chain, and documents stay apart."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from common.errors import UserError
from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.draft import init_weights
from drafts.eagle3.config import Eagle3Config, Eagle3Section
from drafts.eagle3.model import Eagle3
from drafts.places import chain_places
from target.head import TargetHead

VOCABULARY, HIDDEN, STEPS = 40, 16, 3


@pytest.fixture
def draft() -> Eagle3:
    config = Eagle3Config(
        hidden_size=HIDDEN, vocab_size=VOCABULARY, num_target_layers=6, layer_ids=[1, 2], num_speculative_tokens=3,
        ttt_length=STEPS, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=24,
        rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=64, yarn=None, target_fingerprint="", store="",
    )  # fmt: skip
    section = Eagle3Section(num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, ttt_step_loss_decay=0.5)
    model = Eagle3(config, section)
    init_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


@pytest.fixture
def head() -> TargetHead:
    generator = torch.Generator().manual_seed(9)
    embedding, lm_head = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    return TargetHead(embedding, lm_head, torch.ones(HIDDEN), "rms", 1e-6)


def make_batch(lengths: list[int], seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.cat([torch.arange(length) >= 5 for length in lengths])
    return Batch(
        torch.randint(0, VOCABULARY, (total,), generator=generator), mask,
        torch.randn(total, 2 * HIDDEN, generator=generator), torch.randn(total, HIDDEN, generator=generator),
        lengths, [f"sample-{i}" for i in range(len(lengths))], [0] * len(lengths),
    )  # fmt: skip


def serve_step(draft: Eagle3, tokens: torch.Tensor, features: torch.Tensor, head: TargetHead) -> torch.Tensor:
    """The layer over a whole sequence the plain way, causally; its last output before the final norm."""
    layer, attention = draft.midlayer, draft.midlayer.self_attn

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)

    def turn(y: torch.Tensor) -> torch.Tensor:
        cos, sin = draft.rope.at(torch.arange(len(y)))
        return y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin

    x = torch.cat(
        [norm(head.embedding[tokens], layer.input_layernorm.weight), norm(features, layer.hidden_norm.weight)], dim=-1
    )
    q = turn(attention.q_proj(x).unflatten(-1, (4, -1))).transpose(0, 1)
    k = turn(attention.k_proj(x).unflatten(-1, (2, -1))).transpose(0, 1)
    v = attention.v_proj(x).unflatten(-1, (2, -1)).transpose(0, 1)
    output = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
    x = features + attention.o_proj(output[0].transpose(0, 1).flatten(1))
    y = norm(x, layer.post_attention_layernorm.weight)
    gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
    return (x + down(functional.silu(gate(y)) * up(y)))[-1]


def serve_chain(
    draft: Eagle3, tokens: torch.Tensor, aux: torch.Tensor, place: int, head: TargetHead, given: list[int] | None
) -> list[torch.Tensor]:
    """Logits of one chain, the sequence growing by a token a step: the given tokens, or the draft's own."""
    inputs, features = tokens[1 : place + 1], draft.fc(aux)[:place]
    found = []
    for step in range(STEPS):
        hidden = serve_step(draft, inputs, features, head)
        found.append(functional.rms_norm(hidden, (HIDDEN,), draft.norm.weight, 1e-6) @ head.lm_head.T)
        following = int(found[-1].argmax()) if given is None else given[step]
        inputs, features = torch.cat([inputs, torch.tensor([following])]), torch.cat([features, hidden[None]])
    return found


@torch.no_grad()
def test_training_unrolls_what_serving_would_compute_from_every_place(draft: Eagle3, head: TargetHead) -> None:
    batch = make_batch([14])
    found = draft(batch, draft.plan(batch), head)
    expected, count = 0.0, 0
    for place in range(5, 13):
        labels = [int(batch.token_ids[place + 1 + i]) if place + 1 + i < 14 else 0 for i in range(STEPS)]
        logits = serve_chain(draft, batch.token_ids, batch.aux_hidden_states, place, head, labels)
        for step in range(STEPS):
            if place + 1 + step < 14:
                expected += 0.5**step * float(functional.cross_entropy(logits[step], torch.tensor(labels[step])))
                count += 1
    assert int(found.num_slots) == count == 8 * STEPS - 3
    assert float(found.loss_sum) == pytest.approx(expected, rel=1e-4)


def test_dpace_weighs_the_steps_of_each_chain_by_its_own_losses(
    draft: Eagle3, head: TargetHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drafts.chunks.CHUNK_ELEMENTS", 0)
    monkeypatch.setattr("drafts.chunks.MIN_CHUNK_ROWS", 4)  # several chunks, each of whole chains
    assert draft.section is not None
    draft.section = draft.section.model_copy(update={"slot_weights": "dpace", "dpace_smoothing": 0.25})
    batch = make_batch([14])
    expected = 0.0
    for place in range(5, 13):
        labels = [int(batch.token_ids[place + 1 + i]) if place + 1 + i < 14 else 0 for i in range(STEPS)]
        logits = serve_chain(draft, batch.token_ids, batch.aux_hidden_states, place, head, labels)
        losses = functional.cross_entropy(torch.stack(logits).detach(), torch.tensor(labels), reduction="none")[
            : 13 - place
        ]
        reached = (0.75 * torch.exp(-losses) + 0.25).cumprod(0)
        expected += sum(float(loss * reached[step:].sum()) for step, loss in enumerate(losses))
    assert float(draft(batch, draft.plan(batch), head).loss_sum) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("length", "stride"), [(14, 1), (400, 39)])
def test_drafting_is_the_chain_that_serving_grows_token_by_token(
    draft: Eagle3, head: TargetHead, length: int, stride: int
) -> None:
    batch = make_batch([length])
    sample = StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {})
    drafted = draft.draft(sample, head).tokens
    chains, logits = draft.draft_logits(sample, head, chain_places(batch.loss_mask))
    assert torch.equal(chains, drafted[5:-1])
    for place in range(5, length - 1, stride):
        number = place - 5
        expected = serve_chain(draft, batch.token_ids, batch.aux_hidden_states, place, head, None)
        for step in range(STEPS):
            torch.testing.assert_close(logits[number, step], expected[step], rtol=1e-4, atol=1e-4)
        assert drafted[place].tolist() == [int(row.argmax()) for row in expected]
    assert (drafted[:5] == -1).all()
    assert (drafted[-1] == -1).all()


def test_documents_of_a_pack_do_not_see_one_another(draft: Eagle3, head: TargetHead) -> None:
    both = make_batch([14, 10])
    alone = []
    for rows in (slice(0, 14), slice(14, 24)):
        part = Batch(
            both.token_ids[rows], both.loss_mask[rows], both.aux_hidden_states[rows], both.hidden_states[rows],
            [rows.stop - rows.start], ["a"], [0],
        )  # fmt: skip
        alone.append(draft(part, draft.plan(part), head))
    found = draft(both, draft.plan(both), head)
    assert found.loss_sum.item() == pytest.approx(sum(part.loss_sum.item() for part in alone), rel=1e-5)
    assert found.right.tolist() == sum(part.right for part in alone).tolist()


@pytest.mark.parametrize("objective", ["tokens", "distill"])
def test_a_few_samples_are_learned_by_heart(draft: Eagle3, head: TargetHead, objective: str) -> None:
    assert draft.section is not None
    draft.section = draft.section.model_copy(update={"objective": objective})
    init_weights(draft, seed=0)
    batch = make_batch([20, 20])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        found = draft(batch, draft.plan(batch), head)
        loss = found.loss_sum / found.num_slots
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < (0.5 if objective == "tokens" else 0.9) * losses[0]


def test_a_document_without_a_place_is_named(draft: Eagle3) -> None:
    batch = make_batch([14, 10])
    batch.loss_mask[14:] = False
    with pytest.raises(UserError, match="sample sample-1: found no place to draft from"):
        draft.plan(batch)


def test_a_reduced_vocabulary_maps_both_ways_and_unknown_tokens_end_a_chain(draft: Eagle3, head: TargetHead) -> None:
    small = Eagle3(draft.config.model_copy(update={"draft_vocab_size": 10}), draft.section)
    init_weights(small, seed=0)
    kept = torch.arange(0, VOCABULARY, 4)
    small.set_vocabulary(kept, head)
    assert small.lm_head is not None
    assert torch.equal(torch.arange(10) + small.d2t, kept)
    assert torch.equal(small.t2d.nonzero()[:, 0], kept)
    assert torch.equal(small.lm_head.weight, head.lm_head[kept])
    batch = make_batch([14])
    batch.token_ids[5:] = torch.tensor([0, 4, 8, 12, 13, 16, 20, 24, 28])  # 13, at place 9, is unknown
    chains = small.plan(batch)
    assert chains.valid[:5].tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [False] * 3,
        [True] * 3,
    ]
    assert chains.labels[0].tolist() == [1, 2, 3]
    found = small(batch, chains, head)
    found.loss_sum.backward()
    assert small.lm_head.weight.grad is not None
    sample = StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {})
    drafted = small.draft(sample, head).tokens
    assert set(drafted[drafted >= 0].tolist()) <= set(kept.tolist())

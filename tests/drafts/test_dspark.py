"""Claims about DSpark: its loss and its drafts are those of a direct computation, in both layouts of blocks."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch.nn import functional

from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.dflash2.config import DFlash2Section
from drafts.draft import init_weights
from drafts.dspark.config import DSparkConfig, DSparkSection
from drafts.dspark.model import DSpark
from drafts.peagle.config import PEagleSection
from target.head import TargetHead

VOCABULARY, HIDDEN, TOKENS, LENGTH = 40, 16, 3, 24
DIMS = {
    "num_speculative_tokens": TOKENS, "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "markov_rank": 5,
}  # fmt: skip


def make_draft(sample_from_anchor: bool, **changes: object) -> DSpark:
    section = DSparkSection.model_validate({**DIMS, "sample_from_anchor": sample_from_anchor, **changes})
    config = DSparkConfig.model_validate({
        **{key: value for key, value in section.model_dump().items() if key in DSparkConfig.model_fields},
        "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_target_layers": 6, "layer_ids": [1, 3],
        "mask_token_id": 39, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "yarn": None, "target_fingerprint": "t", "store": "s",
    })  # fmt: skip
    draft = DSpark(config, section)
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


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[5:13] = mask[16:] = True
    return Batch(
        torch.randint(0, 39, (LENGTH,), generator=generator),
        mask,
        torch.randn(LENGTH, 2 * HIDDEN, generator=generator),
        torch.randn(LENGTH, HIDDEN, generator=generator),
        [LENGTH],
        ["a"],
        [0],
    )


def slots_of(draft: DSpark, batch: Batch, anchor: int, head: TargetHead) -> torch.Tensor:
    """Return the states of one block's slots that predict, (K, H), from layers that are only called, not planned."""
    blocks = draft.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, [torch.tensor([anchor])])
    assert blocks.anchor_rows.tolist() == [anchor]
    return draft.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)[0]


@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_the_loss_is_that_of_the_paper_computed_slot_by_slot(sample_from_anchor: bool) -> None:
    draft, head, batch = make_draft(sample_from_anchor), make_head(), make_batch()
    plan = draft.plan(batch)
    found = draft(batch, plan, head)
    w1, w2 = draft.markov_head.markov_w1.weight, draft.markov_head.markov_w2.weight
    assert draft.confidence_head is not None
    proj = draft.confidence_head.proj
    loss, weight_sum, ids = torch.zeros(()), 0.0, batch.token_ids
    for anchor in [*range(5, 12), *range(16, 23)]:  # the next token is generated in the same run, too
        states = slots_of(draft, batch, anchor, head)
        for k in range(TOKENS):
            place = anchor + 1 + k
            if place >= LENGTH or not batch.loss_mask[place]:
                break
            e = w1[ids[place - 1]]
            d = (head.lm_head @ states[k] + w2 @ e).softmax(-1)
            t = head.logits(batch.hidden_states[place - 1]).softmax(-1)
            c = torch.sigmoid(proj.weight[0] @ torch.cat([states[k], e]) + proj.bias[0])
            accepted = (1 - 0.5 * (d - t).abs().sum()).detach()
            term = -0.1 * d[ids[place]].log() + 0.9 * (d - t).abs().sum()
            weight = float(torch.exp(torch.tensor(-k / 4.0)))
            loss = loss + weight * (term + functional.binary_cross_entropy(c, accepted))
            weight_sum += weight
    torch.testing.assert_close(found.loss_sum, loss)
    assert plan.normalizer == pytest.approx(weight_sum)
    parameters = list(draft.parameters())
    ours, expected = torch.autograd.grad(found.loss_sum, parameters), torch.autograd.grad(loss, parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_drafts_are_chosen_one_after_another_by_the_token_before(sample_from_anchor: bool) -> None:
    draft, head, batch = make_draft(sample_from_anchor).eval(), make_head(), make_batch()
    sample = StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {})
    found = draft.draft(sample, head)
    assert found.confidence is not None
    w1, w2 = draft.markov_head.markov_w1.weight, draft.markov_head.markov_w2.weight
    places = draft.places(batch.loss_mask).tolist()
    for anchor in places:
        before, states = int(batch.token_ids[anchor]), slots_of(draft, batch, anchor, head)
        for k in range(TOKENS):
            assert draft.confidence_head is not None
            logit = draft.confidence_head.proj(torch.cat([states[k], w1[before]]))
            assert float(found.confidence[anchor, k]) == pytest.approx(float(logit.sigmoid()), abs=1e-5)
            before = int((head.lm_head @ states[k] + w2 @ w1[before]).argmax())
            assert int(found.tokens[anchor, k]) == before
        taps = draft.taps(sample, head, anchor)
        assert taps["draft_logits"].argmax(-1).tolist() == found.tokens[anchor].tolist()
        torch.testing.assert_close(taps["confidence"], found.confidence[anchor])
        torch.testing.assert_close(taps["markov_bias"][0], w2 @ w1[batch.token_ids[anchor]])
    assert len({tuple(row) for row in found.tokens[places].tolist()}) > 5


def test_the_anchor_layout_is_the_fill_in_layout_read_one_slot_earlier() -> None:
    head, batch = make_head(), make_batch()
    of_anchor, fill_in = (make_draft(kind).eval() for kind in (True, False))
    blocks = of_anchor.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, [torch.tensor([9])])
    assert blocks.labels.tolist() == [batch.token_ids[10:13].tolist()]
    assert slots_of(of_anchor, batch, 9, head).shape == slots_of(fill_in, batch, 9, head).shape == (TOKENS, HIDDEN)
    # Both have the anchor's slot; three of it and two masks are the anchor layout's, so K = 2 fills in the same block.
    shorter = make_draft(False, num_speculative_tokens=TOKENS - 1).eval()
    torch.testing.assert_close(slots_of(of_anchor, batch, 9, head)[1:], slots_of(shorter, batch, 9, head))


@pytest.mark.parametrize("section", [DSparkSection, DFlash2Section, PEagleSection])
def test_methods_with_a_default_objective_of_their_own_check_it_as_the_others_do(section: type[BaseModel]) -> None:
    for wrong in ({"tv": -1.0}, {"hinge": 1.0}, {}):
        with pytest.raises(ValidationError):
            section.model_validate({**DIMS, "objective": wrong})


def test_without_a_confidence_head_and_with_tokens_alone_no_final_states_are_needed() -> None:
    assert DSparkSection.model_validate({**DIMS, "objective": "tokens"}).needs_final_states
    assert not DSparkSection.model_validate(
        {**DIMS, "objective": "tokens", "confidence_head": False}
    ).needs_final_states
    draft = make_draft(True, objective="tokens", confidence_head=False)
    batch = make_batch()
    assert float(draft(batch, draft.plan(batch), make_head()).loss_sum.detach()) > 0
    assert (
        draft.draft(
            StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {}),
            make_head(),
        ).confidence
        is None
    )

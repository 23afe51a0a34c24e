"""Claims about DFlash2: its convolutions, its loss and its drafts are those of a direct computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from block_reference import (
    ANCHORS,
    DIMS,
    HIDDEN,
    LENGTH,
    SHARED,
    VOCABULARY,
    as_sample,
    block_states,
    convolve_slowly,
    make_batch,
    make_head,
    spread,
)

from common.errors import UserError
from drafts import METHODS
from drafts.candidates import chosen_logits, log_partition, top_candidates
from drafts.convolution import BlockConvolution
from drafts.dflash.config import DFlashConfig
from drafts.dflash.model import DFlash
from drafts.dflash2.config import SCORER, DFlash2Config, DFlash2Section
from drafts.dflash2.model import DFlash2
from drafts.method import ExportFacts
from drafts.reading import DraftFolder
from drafts.slot_weights import dpace_weights

TOKENS, TOP_K = 3, 16
OWN = {
    **DIMS, "block_size": TOKENS + 1, "conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 5,
    "selector_top_k": TOP_K,
}  # fmt: skip
FACTS = ExportFacts(dtype="float32", target="t", architectures=["X"], bos_token_id=None, eos_token_id=1)


def make_draft(**changes: object) -> DFlash2:
    section = DFlash2Section.model_validate({**OWN, **changes})
    own = {key: value for key, value in section.model_dump().items() if key in DFlash2Config.model_fields}
    draft = DFlash2(DFlash2Config.model_validate({**SHARED, **own}), section)
    spread(draft)
    with torch.no_grad():
        draft.candidate_selector.predecessor_codebook.mul_(10)
    return draft


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_a_convolution_and_its_gradients_are_those_of_loops_over_slots_taps_and_channels(taps: int) -> None:
    layer, generator = BlockConvolution(12, taps, 3), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    x, z, g = (torch.randn(2, 4, 12, generator=generator, requires_grad=True) for _ in range(3))
    weights = {f"c.{name}": parameter for name, parameter in layer.named_parameters()}
    convolved, dynamic = layer.before(x)
    found = convolved, layer.after(z, dynamic)
    expected = [
        torch.stack([convolve_slowly(rows[block], x[block], weights, "c", side) for block in range(2)])
        for side, rows in enumerate((x, z))
    ]
    wanted = [x, z, *layer.parameters()]
    for side in range(2):
        torch.testing.assert_close(found[side], expected[side])
        pairs = zip(
            torch.autograd.grad((found[side] * g).sum(), wanted, retain_graph=True, allow_unused=True),
            torch.autograd.grad((expected[side] * g).sum(), wanted, retain_graph=True, allow_unused=True),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_the_backbone_is_that_of_one_block_computed_alone(taps: int) -> None:
    draft, head, batch = make_draft(conv_kernel_size=taps).eval(), make_head(), make_batch()
    weights = dict(draft.state_dict())
    anchors = torch.tensor([5, 9, 22])
    blocks = draft.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, [anchors])
    found = draft.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)
    for row, anchor in enumerate(anchors.tolist()):
        expected, _ = block_states(draft.config, weights, batch, anchor, head)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_at_first_the_convolutions_change_nothing_and_the_drafts_states_are_dflashs() -> None:
    draft, head, batch = make_draft(), make_head(), make_batch()
    draft.initialize(1, head, lambda: torch.zeros(VOCABULARY))
    own = {key: OWN[key] for key in (*DIMS, "block_size")}
    plain = DFlash(DFlashConfig.model_validate({**SHARED, **own}))
    lost = plain.load_state_dict(draft.state_dict(), strict=False)
    assert not lost.missing_keys
    assert all("_conv." in name or "candidate_selector" in name for name in lost.unexpected_keys)
    states = []
    for model in (draft, plain):
        blocks = model.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, [torch.tensor([5, 9, 22])])
        states.append(model.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding))
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-6)


def selector_scores(draft: DFlash2, h: torch.Tensor, before: int, logits: torch.Tensor, chosen: list[int]) -> Any:
    selector = draft.candidate_selector
    context = selector.predecessor_codebook[before] * (selector.hidden_projection.weight @ h)
    return torch.stack([logits[b] + context @ selector.successor_codebook[b] for b in chosen])


@pytest.mark.parametrize("slot_weights", ["decay", "dpace"])
def test_the_loss_is_distillation_plus_the_selectors_cross_entropy_computed_slot_by_slot(slot_weights: str) -> None:
    draft, head, batch = make_draft(slot_weights=slot_weights, selector_weight=0.7), make_head(), make_batch()
    plan, weights, ids = draft.plan(batch), dict(draft.named_parameters()), batch.token_ids
    found = draft(batch, plan, head)
    loss, num_right, num_replaced = torch.zeros(()), 0, 0
    for anchor in ANCHORS:
        states, _ = block_states(draft.config, weights, batch, anchor, head)
        unary, selected = [], []
        for k in range(TOKENS):
            place = anchor + 1 + k
            if place >= LENGTH or not batch.loss_mask[place]:
                break
            logits = head.lm_head @ states[k]
            t = head.logits(batch.hidden_states[place - 1]).softmax(-1)
            unary.append(-(t * logits.log_softmax(-1)).sum())
            chosen, gold = logits.argsort(descending=True)[:TOP_K].tolist(), int(ids[place])
            known = gold in chosen
            if not known:
                chosen[-1] = gold
                num_replaced += 1
            scores = selector_scores(draft, states[k], int(ids[place - 1]), logits, chosen)
            selected.append(-scores.log_softmax(-1)[chosen.index(gold)])
            num_right += known and chosen[int(scores.argmax())] == gold
        for losses, factor in ((torch.stack(unary), 1.0), (torch.stack(selected), 0.7)):
            if slot_weights == "decay":
                by_slot = torch.exp(-torch.arange(len(losses)) / 4.0)
            else:
                by_slot = dpace_weights(losses.detach()[None], torch.ones(1, len(losses), dtype=torch.bool), 0.5)[0]
            loss = loss + factor * (by_slot * losses).sum()
    assert 3 < num_replaced < plan.num_slots - 3
    assert int(found.right.sum()) == num_right
    torch.testing.assert_close(found.loss_sum, loss, rtol=1e-4, atol=1e-4)
    parameters = list(draft.parameters())
    ours, expected = torch.autograd.grad(found.loss_sum, parameters), torch.autograd.grad(loss, parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_slots_count_as_right_whose_data_are_the_draft_that_the_selector_chooses() -> None:
    draft, head, batch = make_draft(), make_head(), make_batch()
    drafted = draft.draft(as_sample(batch), head).tokens[5]
    ids = torch.cat([batch.token_ids[:6], drafted, batch.token_ids[6 + TOKENS :]])
    batch = dataclasses.replace(batch, token_ids=ids)
    blocks = draft.lay_out(ids, batch.loss_mask, batch.lengths, [torch.tensor([5])])
    assert draft(batch, blocks, head).right.tolist() == [1] * TOKENS


def test_drafts_walk_from_candidate_to_candidate_and_taps_have_the_scores_on_the_way() -> None:
    draft, head, batch = make_draft().eval(), make_head(), make_batch()
    weights, sample = dict(draft.state_dict()), as_sample(batch)
    found = draft.draft(sample, head).tokens
    places = draft.places(batch.loss_mask).tolist()
    assert places == ANCHORS
    changed = 0
    for anchor in places:
        states, _ = block_states(draft.config, weights, batch, anchor, head)
        before, taps = int(batch.token_ids[anchor]), draft.taps(sample, head, anchor)
        for k in range(TOKENS):
            logits = head.lm_head @ states[k]
            chosen = logits.argsort(descending=True)[:TOP_K].tolist()
            scores = selector_scores(draft, states[k], before, logits, chosen)
            torch.testing.assert_close(taps["draft_logits"][k], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(taps["candidate_scores"][k, chosen], scores, rtol=1e-4, atol=1e-4)
            assert int(taps["candidate_scores"][k].isfinite().sum()) == TOP_K
            before = chosen[int(scores.argmax())]
            assert int(found[anchor, k]) == before
            changed += before != chosen[0]
    assert changed > 5  # the selector has a say


def test_the_calls_of_a_serving_draft_give_the_taps_of_training() -> None:
    draft, head, batch = make_draft().eval(), make_head(), make_batch()
    anchor = 9
    taps = draft.taps(as_sample(batch), head, anchor)
    blocks = draft.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, [torch.tensor([anchor])])
    hidden = draft.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding).detach()
    tokens, logits = top_candidates(hidden, head.lm_head, TOP_K)
    edges = draft.candidate_selector.edges(hidden, batch.token_ids[[anchor]], tokens).detach()
    slots = torch.tensor([int(batch.token_ids[anchor]), *[39] * TOKENS])

    class Served(torch.nn.Module):
        """The members of vLLM's draft model that the recorded calls are completed with."""

        lm_head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

        def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
            return states @ head.lm_head.T

    noted = {
        "slots": [slots.double()], "embeddings": [head.embedding[slots]], "compute_candidates": [tokens[0].float()],
        "compute_candidates.input": [hidden[0]], SCORER: [logits[:, :, None] + edges],
    }  # fmt: skip
    found = METHODS["dflash2"].engine_taps(noted, Served())
    assert found.keys() == taps.keys()
    for name, tensor in taps.items():
        torch.testing.assert_close(found[name], tensor)


def test_sampled_drafts_have_the_probabilities_of_the_candidates_scores_after_the_datas_tokens() -> None:
    draft, head, batch = make_draft().eval(), make_head(), make_batch()
    weights, ids = dict(draft.state_dict()), batch.token_ids
    found, positive = draft.score(as_sample(batch), head, 0.7), 0
    for anchor in ANCHORS:
        states, _ = block_states(draft.config, weights, batch, anchor, head)
        for k, place in enumerate(range(anchor + 1, min(anchor + 1 + TOKENS, LENGTH))):
            logits = head.lm_head @ states[k]
            chosen, gold = logits.argsort(descending=True)[:TOP_K].tolist(), int(ids[place])
            scores = selector_scores(draft, states[k], int(ids[place - 1]), logits, chosen)
            expected = float((scores.detach() / 0.7).softmax(-1)[chosen.index(gold)]) if gold in chosen else 0.0
            assert float(found[anchor, k]) == pytest.approx(expected, abs=1e-4)
            positive += expected > 0
    assert 3 < positive < 30


def test_logits_of_chosen_tokens_and_the_partition_have_the_gradients_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    states, weight = (torch.randn(n, HIDDEN, generator=generator, requires_grad=True) for n in (150, VOCABULARY))
    tokens = torch.randint(0, VOCABULARY, (150, 4), generator=generator)
    g = torch.randn(150, 4, generator=generator)
    logits = states @ weight.T
    pairs = [(chosen_logits(states, weight, tokens), logits.gather(1, tokens), [states, weight])]
    pairs.append((log_partition(states, weight)[:, None].expand(-1, 4), logits.logsumexp(1, keepdim=True), [states]))
    for found, expected, wanted in pairs:
        torch.testing.assert_close(found, expected.expand(-1, 4))
        gradients = (torch.autograd.grad((part * g).sum(), wanted, retain_graph=True) for part in (found, expected))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_export_has_vllms_names_shapes_and_keys_and_only_this_method_reads_it() -> None:
    draft, method = make_draft(), METHODS["dflash2"]
    exported, tensors = method.export(draft.config, draft.state_dict(), "native", FACTS)
    groups = HIDDEN // 4
    for name, shape in {
        "layers.1.attention_conv.base_kernel": (2, 2, HIDDEN),
        "layers.0.mlp_conv.kernel_projection.weight": (2 * 2 * groups, HIDDEN),
        "candidate_selector.predecessor_codebook": (VOCABULARY, 5),
        "candidate_selector.successor_codebook": (VOCABULARY, 5),
        "candidate_selector.hidden_projection.weight": (5, HIDDEN),
    }.items():
        assert tuple(tensors[name].shape) == shape
    assert exported["architectures"] == ["DFlash2DraftModel"]
    assert exported["block_size"] == TOKENS + 1
    assert exported["dflash_config"] == {
        "mask_token_id": 39, "target_layer_ids": [1, 3], "conv_kernel_size": 2, "conv_group_size": 4,
        "selector_rank": 5, "selector_top_k": TOP_K,
    }  # fmt: skip
    readers = [name for name, other in METHODS.items() if other.describe(exported) is not None]
    assert readers == ["dflash2"]
    described = method.describe(exported)
    assert described is not None
    assert described.speculative == method.speculative_config(draft.config) == {"method": "dflash"}
    assert described.num_speculative_tokens == TOKENS


def in_speculators_format(exported: dict[str, Any]) -> dict[str, Any]:
    inner = dict(exported["dflash_config"])
    ids = [i + 1 for i in inner.pop("target_layer_ids")]
    layer = {key: value for key, value in exported.items() if key not in ("architectures", "dflash_config")}
    return {
        "speculators_model_type": "dflash2", "architectures": ["DFlash2DraftModel"], "block_size": TOKENS + 1,
        "aux_hidden_state_layer_ids": ids, "transformer_layer_config": layer, "sample_from_anchor": False,
        "draft_vocab_size": VOCABULARY, **inner,
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["native", "speculators"])
def test_a_folder_is_read_back_as_the_draft_that_it_was(layout: str) -> None:
    draft, method = make_draft(), METHODS["dflash2"]
    exported, tensors = method.export(draft.config, draft.state_dict(), "native", FACTS)
    config = exported if layout == "native" else in_speculators_format(exported)
    assert [name for name, other in METHODS.items() if other.describe(config) is not None] == ["dflash2"]
    found = method.read_published(DraftFolder(Path("x"), config, tensors, 6))
    assert found.layers.ids == [1, 3]
    assert DFlash2Config.model_validate({**draft.config.model_dump(), **found.facts}) == draft.config
    assert {"selector_rank", "selector_top_k", "conv_kernel_size", "conv_group_size"} < set(found.facts)
    assert found.weights.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("input_embedding_scale", 2.0, "found 2.0, expected 1.0"),
        ("final_logit_softcapping", 30.0, "found 30.0, expected none"),
        ("selector_rank", None, "found none, expected one"),
        ("shift_label", True, "false: slot k predicts"),
    ],
)
def test_what_the_module_does_not_compute_is_refused_by_name(key: str, value: object, told: str) -> None:
    draft, method = make_draft(), METHODS["dflash2"]
    exported, tensors = method.export(draft.config, draft.state_dict(), "native", FACTS)
    exported["dflash_config"][key] = value
    with pytest.raises(UserError, match=told):
        method.read_published(DraftFolder(Path("x"), exported, tensors, 6))


def test_more_taps_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="conv_kernel_size must not exceed block_size"):
        DFlash2Section.model_validate({**OWN, "conv_kernel_size": TOKENS + 2})

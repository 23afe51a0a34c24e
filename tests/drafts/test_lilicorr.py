"""Claims about LiLiCorr: its scores, its loss and its drafts are those of a direct computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    make_batch,
    make_head,
    rms,
    spread,
)
from torch.nn import functional

from common.errors import UserError
from drafts import METHODS
from drafts.lilicorr.config import LiLiCorrConfig, LiLiCorrSection
from drafts.lilicorr.model import LiLiCorr
from drafts.method import ExportFacts
from drafts.reading import DraftFolder
from target.head import TargetHead

TOKENS, TOP_K, WIDTH, FACTORS, HEADS = 3, 8, 12, 6, 2
OWN = {
    **DIMS, "block_size": TOKENS + 1, "lilicorr_candidate_topk": TOP_K, "lilicorr_hidden_size": WIDTH,
    "lilicorr_num_layers": 2, "lilicorr_num_heads": HEADS, "lilicorr_mlp_ratio": 1.5, "lilicorr_factor_dim": FACTORS,
}  # fmt: skip
CONVOLUTION = {"conv_kernel_size": 2, "conv_group_size": 4}
FACTS = ExportFacts(dtype="float32", target="t", architectures=["X"], bos_token_id=None, eos_token_id=1)
Weights = Mapping[str, torch.Tensor]


def make_draft(**changes: object) -> LiLiCorr:
    section = LiLiCorrSection.model_validate({**OWN, **changes})
    own = {key: value for key, value in section.model_dump().items() if key in LiLiCorrConfig.model_fields}
    draft = LiLiCorr(LiLiCorrConfig.model_validate({**SHARED, **own}), section)
    spread(draft)
    return draft


def score_lattice(
    weights: Weights, states: torch.Tensor, last: torch.Tensor | None, head: TargetHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the candidates (K, k) and their scores (K, k, k), each pair of vectors compared on its own."""
    w = {name.removeprefix("lilicorr."): value for name, value in weights.items() if name.startswith("lilicorr.")}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    log_probs = (states @ head.lm_head.T).log_softmax(-1)
    tokens = log_probs.argsort(-1, descending=True)[:, :TOP_K]
    nodes, slots = [], []
    for slot in range(TOKENS):
        for rank in range(TOP_K):
            own, best = log_probs[slot, tokens[slot, rank]], log_probs[slot].max()
            values = [own, own.exp(), own - best, torch.tensor(rank / (TOP_K - 1)), torch.tensor(float(rank == 0))]
            features = functional.layer_norm(
                torch.stack(values), (5,), w["feature_norm.weight"], w["feature_norm.bias"]
            )
            node = linear("feature_mlp.down_proj", functional.silu(linear("feature_mlp.up_proj", features)))
            embedding = head.embedding[tokens[slot, rank]]
            node = node + (linear("token_proj", embedding) if "token_proj.weight" in w else embedding)
            node = node + linear("pass_hidden_proj", states[slot])
            nodes.append(node + w["slot_embedding"][0, 0, slot, 0] + w["rank_embedding"][0, 0, 0, rank])
            slots.append(slot)
    x, size = torch.stack(nodes), WIDTH // HEADS
    for number in range(2):
        name, mixed = f"layers.{number}", []
        normed = rms(x, w[f"{name}.attn_norm.weight"])
        parts = (normed @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]).split(len(x[0]), -1)
        for h in range(HEADS):
            query, key, value = (part[:, h * size : (h + 1) * size] for part in parts)
            bias = [
                [w["relative_slot_bias"][h, a - b + TOKENS] + (a == b) * w["same_slot_bias"][h] for b in slots]
                for a in slots
            ]
            scores = query @ key.T / size**0.5 + torch.stack([torch.stack(row) for row in bias])
            mixed.append(scores.softmax(-1) @ value)
        x = x + linear(f"{name}.attn.out_proj", torch.cat(mixed, dim=-1))
        up = functional.silu(linear(f"{name}.mlp.up_proj", rms(x, w[f"{name}.mlp_norm.weight"])))
        x = x + linear(f"{name}.mlp.down_proj", up)
    x = rms(x, w["output_norm.weight"])
    anchor = torch.zeros(WIDTH) if last is None else linear("context_proj", last)
    anchor = rms(anchor, w["anchor_norm.weight"])
    joined = torch.stack([torch.cat([node, anchor, node * anchor]) for node in x])
    e = functional.silu(linear("factor_input_proj", joined))
    unit = lambda vectors: vectors / vectors.norm(dim=-1, keepdim=True)  # noqa: E731
    out, entering = (unit(linear(f"{name}_head", e)).view(TOKENS, TOP_K, -1) for name in ("out", "in"))
    start = unit(linear("anchor_out_head", anchor))
    pairs = [
        [[8.0 * (start if s == 0 else out[s - 1, i]) @ entering[s, j] for j in range(TOP_K)] for i in range(TOP_K)]
        for s in range(TOKENS)
    ]
    return tokens, torch.stack([torch.stack([torch.stack(row) for row in slot]) for slot in pairs])


@pytest.mark.parametrize(
    "changes",
    [{}, CONVOLUTION, {"lilicorr_hidden_size": HIDDEN, "lilicorr_num_heads": 2}],
    ids=["plain", "convolution", "no token_proj"],
)
def test_drafts_walk_through_the_candidates_by_the_scores_of_a_direct_computation(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, head, batch = make_draft(**changes).eval(), make_head(), make_batch()
    monkeypatch.setitem(globals(), "WIDTH", draft.config.lilicorr_hidden_size)
    mask = torch.cat([torch.ones(2, dtype=torch.bool), batch.loss_mask[2:]])  # an anchor without any context, too
    batch = dataclasses.replace(batch, loss_mask=mask)
    weights, sample, changed = dict(draft.state_dict()), as_sample(batch), 0
    assert ("lilicorr.token_proj.weight" in weights) == (draft.config.lilicorr_hidden_size != HIDDEN)
    found = draft.draft(sample, head).tokens
    places = draft.places(batch.loss_mask).tolist()
    assert places == [0, *ANCHORS]
    for anchor in places:
        states, context = block_states(draft.config, weights, batch, anchor, head)
        tokens, scores = score_lattice(weights, states, context[-1] if anchor else None, head)
        taps, before = draft.taps(sample, head, anchor), 0
        for k in range(TOKENS):
            row = scores[k, before]
            torch.testing.assert_close(taps["draft_logits"][k], head.lm_head @ states[k], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(taps["candidate_scores"][k, tokens[k]], row, rtol=1e-3, atol=1e-3)
            assert int(taps["candidate_scores"][k].isfinite().sum()) == TOP_K
            before = int(row.argmax())
            assert int(found[anchor, k]) == int(tokens[k, before])
            changed += before > 0
    assert changed > 5  # the head has a say


def test_sampled_drafts_have_the_probabilities_of_the_candidates_scores_after_the_datas_tokens() -> None:
    draft, head = make_draft().eval(), make_head()
    batch = with_known_labels(draft, head)
    weights, found, known = dict(draft.state_dict()), draft.score(as_sample(batch), head, 0.7), 0
    for anchor in ANCHORS:
        states, context = block_states(draft.config, weights, batch, anchor, head)
        tokens, scores = score_lattice(weights, states, context[-1], head)
        before = 0
        for k, place in enumerate(range(anchor + 1, min(anchor + 1 + TOKENS, LENGTH))):
            gold = int(batch.token_ids[place])
            if gold not in tokens[k].tolist():
                assert float(found[anchor, k]) == 0.0
                break
            own = tokens[k].tolist().index(gold)
            expected = float((scores[k, before] / 0.7).softmax(-1)[own])
            assert float(found[anchor, k]) == pytest.approx(expected, abs=1e-4)
            known, before = known + (k > 0), own
    assert known > 3


def with_known_labels(draft: LiLiCorr, head: TargetHead) -> Any:
    """A batch whose data are often among the candidates: those of the draft after some anchors."""
    batch = make_batch()
    ids = batch.token_ids
    for start in (5, 9, 17, 20):
        drafted = draft.draft(as_sample(batch), head).tokens[start, :2]
        ids = torch.cat([ids[: start + 1], drafted, ids[start + 3 :]])
        batch = dataclasses.replace(batch, token_ids=ids)
    return batch


@pytest.mark.parametrize("changes", [{}, {"margin_weight": 0.5, **CONVOLUTION}], ids=["base", "margin, convolution"])
def test_the_loss_is_that_of_the_paper_computed_slot_by_slot(changes: dict[str, Any]) -> None:
    draft, head = make_draft(**changes), dataclasses.replace(make_head(), softcap=3.0)
    batch = with_known_labels(draft, head)
    plan, weights, ids = draft.plan(batch), dict(draft.named_parameters()), batch.token_ids
    found = draft(batch, plan, head)
    unary, weight_sum, terms = torch.zeros(()), 0.0, []
    for anchor in ANCHORS:
        states, context = block_states(draft.config, weights, batch, anchor, head)
        tokens, scores = score_lattice(weights, states, context[-1], head)
        places = range(anchor + 1, anchor + 1 + TOKENS)
        places = [place for place in places if place < LENGTH and batch.loss_mask[place]]
        for k, place in enumerate(places):
            weight = float(torch.exp(torch.tensor(-k / 7.0)))
            unary = unary - weight * (head.lm_head @ states[k]).log_softmax(-1)[ids[place]]
            weight_sum += weight
        before = 0
        for k, place in enumerate(places if len(places) == TOKENS else []):
            gold = int(ids[place])
            if gold not in tokens[k].tolist():
                break
            own, z = tokens[k].tolist().index(gold), scores[k, before]
            t = head.logits(batch.hidden_states[place - 1])
            term = -0.25 * z.log_softmax(-1)[own]
            term = term + 0.25 * sum(z.softmax(-1)[j] * (t[gold] - t[tokens[k, j]]).clamp(min=0) for j in range(TOP_K))
            if "margin_weight" in changes:
                other = max(z[j] for j in range(TOP_K) if j != own)
                term = term + 0.5 * (2.0 - (z[own] - other)).clamp(min=0)
            terms.append(term)
            before = own
    assert 8 < len(terms) < TOKENS * len(plan.whole)
    loss = unary + weight_sum * torch.stack(terms).mean()
    assert plan.normalizer == pytest.approx(weight_sum)
    torch.testing.assert_close(found.loss_sum, loss, rtol=1e-4, atol=1e-4)
    parameters = list(draft.parameters())
    ours, expected = torch.autograd.grad(found.loss_sum, parameters), torch.autograd.grad(loss, parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_slots_count_as_right_whose_data_are_the_draft_that_the_head_chooses() -> None:
    draft, head, batch = make_draft(), make_head(), make_batch()
    drafted = draft.draft(as_sample(batch), head).tokens[5]
    ids = torch.cat([batch.token_ids[:6], drafted, batch.token_ids[6 + TOKENS :]])
    batch = dataclasses.replace(batch, token_ids=ids)
    blocks = draft.lay_out(ids, batch.loss_mask, batch.lengths, [torch.tensor([5])])
    assert draft(batch, blocks, head).right.tolist() == [1] * TOKENS


def test_a_batch_without_a_whole_block_gives_the_heads_parameters_gradients_of_zero() -> None:
    draft, head, batch = make_draft(), make_head(), make_batch()
    blocks = draft.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, [torch.tensor([11, 22])])
    assert len(blocks.whole) == 0
    draft(batch, blocks, head).loss_sum.backward()
    assert all(not parameter.grad.any() for parameter in draft.lilicorr.parameters())  # type: ignore[union-attr]
    assert draft.norm.weight.grad is not None
    assert draft.norm.weight.grad.any()


def test_recomputing_the_candidates_in_the_backward_pass_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    head, batch = make_head(), make_batch()
    draft = make_draft()
    gradients = []
    for saves, at_once in ((False, 128), (True, 4)):
        monkeypatch.setattr("drafts.lilicorr.model.BLOCKS_AT_ONCE", at_once)
        draft.gradient_checkpointing = saves
        gradients.append(torch.autograd.grad(draft(batch, draft.plan(batch), head).loss_sum, list(draft.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_at_first_biases_and_embeddings_of_slots_are_zero_and_convolutions_change_nothing() -> None:
    draft = make_draft(**CONVOLUTION)
    draft.initialize(1, make_head(), lambda: torch.zeros(VOCABULARY))
    for name, parameter in draft.named_parameters():
        if name.endswith(("bias", "_embedding", "kernel_projection.weight")):
            assert not parameter.any(), name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("base_kernel"):
            assert (parameter[:, 0] == 1).all(), name
            assert not parameter[:, 1:].any(), name
        else:
            assert 0.01 < float(parameter.detach().std()) < 0.03, name


@pytest.mark.parametrize("changes", [{}, CONVOLUTION], ids=["plain", "convolution"])
def test_an_export_has_vllms_names_shapes_and_keys_and_is_read_back(changes: dict[str, Any]) -> None:
    draft, method = make_draft(**changes), METHODS["lilicorr"]
    exported, tensors = method.export(draft.config, draft.state_dict(), "native", FACTS)
    expected = {
        "token_proj": [WIDTH, HIDDEN], "pass_hidden_proj": [WIDTH, HIDDEN], "context_proj": [WIDTH, HIDDEN],
        "feature_norm": [5], "feature_mlp.up_proj": [WIDTH, 5], "feature_mlp.down_proj": [WIDTH, WIDTH],
        "factor_input_proj": [WIDTH, 3 * WIDTH], "out_head": [FACTORS, WIDTH], "in_head": [FACTORS, WIDTH],
        "anchor_out_head": [FACTORS, WIDTH],
        **{f"layers.{i}.attn.out_proj": [WIDTH, WIDTH] for i in range(2)},
        **{f"layers.{i}.mlp.up_proj": [18, WIDTH] for i in range(2)},
        **{f"layers.{i}.mlp.down_proj": [WIDTH, 18] for i in range(2)},
    }  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in expected.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in expected.items()}
    shapes |= {f"{name}.weight": [WIDTH] for name in ("output_norm", "anchor_norm")}
    shapes |= {f"layers.{i}.{name}_norm.weight": [WIDTH] for i in range(2) for name in ("attn", "mlp")}
    shapes |= {f"layers.{i}.attn.in_proj_weight": [3 * WIDTH, WIDTH] for i in range(2)}
    shapes |= {f"layers.{i}.attn.in_proj_bias": [3 * WIDTH] for i in range(2)}
    shapes |= {"slot_embedding": [1, 1, TOKENS, 1, WIDTH], "rank_embedding": [1, 1, 1, TOP_K, WIDTH]}
    shapes |= {"relative_slot_bias": [HEADS, 2 * TOKENS + 1], "same_slot_bias": [HEADS]}
    found = {name.removeprefix("lilicorr."): list(t.shape) for name, t in tensors.items() if "lilicorr." in name}
    assert found == shapes
    assert exported["architectures"] == ["LiLiCorrDraftModel"]
    assert exported["has_own_lm_head"] is False
    assert exported["dflash_config"] == {
        "mask_token_id": 39, "target_layer_ids": [1, 3], "lilicorr_enabled": True, "block_size": TOKENS + 1,
        "lilicorr_candidate_topk": TOP_K, "lilicorr_hidden_size": WIDTH, "lilicorr_num_layers": 2,
        "lilicorr_num_heads": HEADS, "lilicorr_mlp_ratio": 1.5, "lilicorr_factor_dim": FACTORS,
        "lilicorr_vector_eps": 1e-4, "lilicorr_logit_scale": 8.0, **changes,
    }  # fmt: skip
    assert [name for name, other in METHODS.items() if other.describe(exported) is not None] == ["lilicorr"]
    described = method.describe(exported)
    assert described is not None
    assert described.speculative == method.speculative_config(draft.config) == {"method": "dflash"}
    assert described.num_speculative_tokens == TOKENS
    read = method.read_published(DraftFolder(Path("x"), exported, tensors, 6))
    assert LiLiCorrConfig.model_validate({**draft.config.model_dump(), **read.facts}) == draft.config
    assert {key for key in OWN if key.startswith("lilicorr_")} < set(read.facts)
    assert read.weights.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("lilicorr_enabled", False, "found False, expected true"),
        ("conv_kernel_size", 2, "found 2 and None, expected both, or neither"),
        ("lilicorr_factor_dim", None, r"\(lilicorr_factor_dim\): found none, expected one"),
        ("use_swa", True, "found none, expected a number: layers are sliding"),
    ],
)
def test_what_the_module_does_not_compute_is_refused_by_name(key: str, value: object, told: str) -> None:
    draft, method = make_draft(), METHODS["lilicorr"]
    exported, tensors = method.export(draft.config, draft.state_dict(), "native", FACTS)
    exported["dflash_config"][key] = value
    with pytest.raises(UserError, match=told):
        method.read_published(DraftFolder(Path("x"), exported, tensors, 6))


def test_a_head_as_wide_as_the_draft_may_leave_out_its_width() -> None:
    draft, method = make_draft(lilicorr_hidden_size=HIDDEN), METHODS["lilicorr"]
    exported, tensors = method.export(draft.config, draft.state_dict(), "native", FACTS)
    del exported["dflash_config"]["lilicorr_hidden_size"]
    read = method.read_published(DraftFolder(Path("x"), exported, tensors, 6))
    assert read.facts["lilicorr_hidden_size"] == HIDDEN


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lilicorr_num_heads": 5}, "multiple of lilicorr_num_heads"),
        ({"conv_kernel_size": 2}, "give both, or neither"),
        ({"conv_kernel_size": 5, "conv_group_size": 4}, "must not exceed block_size"),
        ({"candidate_weight": 0, "penalty_weight": 0}, "must be above 0"),
        ({"lilicorr_candidate_topk": 6}, "Input should be 2, 4, 8 or 16"),
    ],
)
def test_a_section_that_vllm_or_training_could_not_use_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LiLiCorrSection.model_validate({**OWN, **changes})


def test_without_the_penalty_no_final_states_are_needed() -> None:
    assert LiLiCorrSection.model_validate(OWN).needs_final_states
    section = LiLiCorrSection.model_validate({**OWN, "penalty_weight": 0})
    assert not section.needs_final_states
    draft, batch = make_draft(penalty_weight=0), make_batch()
    batch = dataclasses.replace(batch, hidden_states=batch.hidden_states[:, :0])
    assert float(draft(batch, draft.plan(batch), make_head()).loss_sum.detach()) > 0

"""Claims about the draft: who sees what, packing changes nothing, and the walk is that of speculative decoding."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from common.errors import UserError
from contracts.draft import Yarn
from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.dflash.config import DFlashConfig, DFlashSection
from drafts.dflash.model import DFlash
from drafts.draft import init_weights
from drafts.places import spans_of
from target.head import TargetHead
from train.walk import expected_acceptances, walk, walk_sample

VOCABULARY, HIDDEN, BLOCK = 40, 16, 4


def make_config(**changes: object) -> DFlashConfig:
    values: dict[str, object] = {
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_target_layers": 6,
        "layer_ids": [1, 3],
        "block_size": BLOCK,
        "mask_token_id": 39,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "yarn": None,
        "target_fingerprint": "t",
        "store": "s",
        **changes,
    }
    return DFlashConfig.model_validate(values)


@pytest.fixture
def model() -> DFlash:
    model = DFlash(make_config())
    init_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # far from the origin, where everything would look alike
    return model.eval()


def forward(
    model: DFlash, tokens: list[torch.Tensor], aux: list[torch.Tensor], anchors: list[torch.Tensor]
) -> torch.Tensor:
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(9))
    ids = torch.cat(tokens)
    blocks = model.lay_out(ids, torch.ones(len(ids), dtype=torch.bool), [len(part) for part in tokens], anchors)
    with torch.no_grad():
        return model.hidden(ids, torch.cat(aux), blocks, embedding)


def make_inputs(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 39, (length,), generator=generator)
    return tokens, torch.randn(length, 2 * HIDDEN, generator=generator)


def test_a_block_sees_the_context_strictly_before_its_anchor(model: DFlash) -> None:
    tokens, aux = make_inputs(20, seed=1)
    anchor = torch.tensor([9])
    before = forward(model, [tokens], [aux], [anchor])
    from_anchor_on = aux.clone()
    from_anchor_on[9:] += 5
    assert torch.equal(forward(model, [tokens], [from_anchor_on], [anchor]), before)
    just_before = aux.clone()
    just_before[8] += 5
    assert not torch.allclose(forward(model, [tokens], [just_before], [anchor]), before)


def test_a_block_knows_its_anchor_and_no_token_after_it(model: DFlash) -> None:
    tokens, aux = make_inputs(20, seed=1)
    anchor = torch.tensor([9])
    before = forward(model, [tokens], [aux], [anchor])
    later = tokens.clone()
    later[10:] = 0
    assert torch.equal(forward(model, [later], [aux], [anchor]), before)
    other_anchor = tokens.clone()
    other_anchor[9] = (tokens[9] + 1) % 39
    assert not torch.allclose(forward(model, [other_anchor], [aux], [anchor]), before)


def test_many_anchors_in_packed_samples_give_what_each_gives_alone(model: DFlash) -> None:
    inputs = [make_inputs(40, seed=1), make_inputs(25, seed=2)]
    anchors = [torch.arange(2, 39), torch.tensor([3, 7, 20])]  # more than one group in the first sample
    packed = forward(model, [i[0] for i in inputs], [i[1] for i in inputs], anchors)
    alone = [
        forward(model, [tokens], [aux], [anchor[None]])
        for (tokens, aux), places in zip(inputs, anchors, strict=True)
        for anchor in places
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_yarn_changes_what_the_draft_computes() -> None:
    tokens, aux = make_inputs(40, seed=1)
    outputs = []
    for yarn in (None, Yarn(factor=4.0, original_max_position_embeddings=16)):
        model = DFlash(make_config(yarn=yarn))
        init_weights(model, seed=3)
        outputs.append(forward(model, [tokens], [aux], [torch.tensor([30])]))
    assert not torch.allclose(*outputs)


def test_labels_are_the_next_generated_tokens_and_end_with_their_run(model: DFlash) -> None:
    tokens = torch.arange(10)
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    blocks = model.lay_out(tokens, mask, [10], [torch.tensor([2, 3, 8])])
    assert blocks.labels[0].tolist() == [3, 4, 5]
    # The second run is another turn: a block from the first one must not learn it.
    assert blocks.valid.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert blocks.num_slots == 4


def dense_hidden(
    model: DFlash, tokens: torch.Tensor, aux: torch.Tensor, anchors: torch.Tensor, embedding: torch.Tensor
):  # type: ignore[no-untyped-def]
    """The draft written the slow way: one mask over all blocks, one attention, torch's own operations."""
    config, total = model.config, len(tokens)
    context = functional.rms_norm(aux @ model.fc.weight.T, (HIDDEN,), model.hidden_norm.weight, 1e-6)
    slots = torch.full((len(anchors), BLOCK), 39)
    slots[:, 0] = tokens[anchors]
    x = functional.embedding(slots, embedding).flatten(0, 1)
    positions = (anchors[:, None] + torch.arange(BLOCK)).flatten()
    owner = torch.arange(len(anchors)).repeat_interleave(BLOCK)
    context_mask, own_mask = torch.arange(total)[None] < anchors[owner][:, None], owner[:, None] == owner[None]
    away = positions[:, None] - torch.arange(total)
    earlier = positions[:, None] >= positions[None]

    def turn(y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        half = y.shape[-1] // 2
        turned = torch.cat([-y[..., half:], y[..., :half]], -1)
        cos, sin = model.rope.at(places)
        return y * cos + turned * sin

    for layer, (causal, window) in zip(model.layers, config.rules, strict=True):
        seen = context_mask if window is None else context_mask & (away < window)
        mask = torch.cat([seen, own_mask & earlier if causal else own_mask], dim=1)
        attention, y = layer.self_attn, functional.rms_norm(x, (HIDDEN,), layer.input_layernorm.weight, 1e-6)
        both, places = torch.cat([context, y]), torch.cat([torch.arange(total), positions])
        q = (y @ attention.q_proj.weight.T).unflatten(-1, (config.num_attention_heads, -1))
        k = (both @ attention.k_proj.weight.T).unflatten(-1, (config.num_key_value_heads, -1))
        v = (both @ attention.v_proj.weight.T).unflatten(-1, (config.num_key_value_heads, -1))
        q = turn(functional.rms_norm(q, (8,), attention.q_norm.weight, 1e-6), positions)
        k = turn(functional.rms_norm(k, (8,), attention.k_norm.weight, 1e-6), places)
        q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))
        output = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + output[0].transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
        y = functional.rms_norm(x, (HIDDEN,), layer.post_attention_layernorm.weight, 1e-6)
        gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
        x = x + (functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return functional.rms_norm(x, (HIDDEN,), model.norm.weight, 1e-6).unflatten(0, (-1, BLOCK))[:, 1:]


MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
RULES = [{}, MIXED, {**MIXED, "is_causal": False}, {"sliding_window": 7}, {"is_causal": True}]


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
@pytest.mark.parametrize(
    "rules", [{}, MIXED, {**MIXED, "is_causal": False}, {"sliding_window": 7}, {"is_causal": True}]
)
def test_values_and_gradients_are_those_of_dense_attention(
    model: DFlash, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, rules: dict[str, object]
) -> None:
    model.config = make_config(**rules)
    monkeypatch.setattr("drafts.attention.KEPT_BYTES", kept_bytes)  # 0: attention weights are computed again
    tokens, aux = make_inputs(60, seed=1)
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(9))
    anchors = torch.arange(1, 59, 2)  # two groups
    weights = torch.randn(len(anchors), BLOCK - 1, HIDDEN, generator=torch.Generator().manual_seed(5))
    found = []
    for dense in (False, True):
        inputs = aux.clone().requires_grad_()
        model.zero_grad()
        if dense:
            output = dense_hidden(model, tokens, inputs, anchors, embedding)
        else:
            blocks = model.lay_out(tokens, torch.ones(60, dtype=torch.bool), [60], [anchors])
            output = model.hidden(tokens, inputs, blocks, embedding)
        (output * weights).sum().backward()
        found.append([output.detach(), inputs.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).norm() / reference.norm() < 1e-4


def test_gradient_checkpointing_changes_no_gradient(model: DFlash) -> None:
    model.section = DFlashSection(num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, num_anchors=9)
    tokens, aux = make_inputs(40, seed=1)
    states = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(3))
    head = TargetHead(weight, weight, torch.ones(HIDDEN), "rms", 1e-6)
    batch = Batch(tokens, torch.arange(40) > 4, aux, states, [40], ["a"], [7])
    found = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.train().zero_grad()
        model(batch, model.plan(batch), head).loss_sum.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_document_without_a_place_for_an_anchor_is_named(model: DFlash) -> None:
    model.section = DFlashSection(num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
    tokens, aux = make_inputs(20, seed=1)
    mask = torch.arange(20) == 7
    with pytest.raises(UserError, match="sample second: found no place for an anchor"):
        model.plan(
            Batch(
                torch.cat([tokens, tokens]),
                torch.cat([mask | (torch.arange(20) == 8), mask]),
                torch.cat([aux, aux]),
                torch.zeros(40, HIDDEN),
                [20, 20],
                ["first", "second"],
                [0, 1],
            )
        )


def make_sample(tokens: list[int], spans: list[tuple[int, int]]) -> StoredSample:
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    for start, end in spans:
        mask[start:end] = True
    nothing = torch.zeros(len(tokens), 1)
    return StoredSample(torch.tensor(tokens), mask, nothing, nothing, {})


def speculate(reply: list[int], drafts: dict[int, list[int]]) -> list[int]:
    """Speculative decoding written the slow way: emit tokens one step at a time until the reply is out."""
    emitted, accepted = [reply[0]], []
    while len(emitted) < len(reply):
        draft = drafts[len(emitted) - 1]
        left = reply[len(emitted) :]
        count = 0
        for guess, truth in zip(draft, left, strict=False):
            if guess != truth:
                break
            count += 1
        emitted += left[: count + 1]
        accepted.append(count)
    return accepted


def test_the_walk_accepts_the_matching_prefix_and_jumps_past_one_token_more() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        prompt = 3
        reply = torch.randint(0, 3, (17,), generator=generator).tolist()
        drafted = torch.randint(0, 3, (prompt + 17, BLOCK - 1), generator=generator)
        drafts = {i: drafted[prompt + i].tolist() for i in range(17)}
        sample = make_sample([9, 9, 9, *reply], [(prompt, prompt + 17)])
        assert walk(sample, drafted) == [speculate(reply, drafts)]


def test_the_walk_takes_each_reply_apart_and_none_for_a_single_token() -> None:
    sample = make_sample([9, 1, 2, 9, 5, 9, 1, 2, 3], [(1, 3), (4, 5), (6, 9)])
    drafted = torch.full((9, BLOCK - 1), -1)
    drafted[6] = torch.tensor([2, 3, 7])
    assert spans_of(sample.loss_mask) == [(1, 3), (4, 5), (6, 9)]
    assert walk(sample, drafted) == [[0], [], [2]]


def test_expected_acceptance_is_what_sampling_accepts_on_average() -> None:
    # Replies drawn from the target's own distribution q, drafts fixed: the mean over many walks meets the expectation.
    generator = torch.Generator().manual_seed(0)
    size, length, vocabulary = 8, 12, 5
    head = TargetHead(torch.zeros(vocabulary, size), torch.randn(vocabulary, size, generator=generator) * 2,
                      torch.ones(size), "rms", 1e-6)  # fmt: skip
    states = torch.randn(length, size, generator=generator)
    q = head.logits(states).div(0.8).softmax(-1)
    drafted = head.logits(states).argmax(-1)
    drafted = torch.stack([drafted.roll(-shift) for shift in range(BLOCK - 1)], dim=1)
    counted, expected = [], []
    for _ in range(2000):
        tokens = torch.cat([torch.zeros(1, dtype=torch.long), torch.multinomial(q, 1, generator=generator)[:-1, 0]])
        sample = StoredSample(tokens, torch.arange(length) > 0, states, states, {"temperature": "0.8"})
        found = walk_sample(sample, drafted)
        counted.append(sum(found.steps))
        expected.append(expected_acceptances(found, sample, head))
    means = torch.tensor(counted).float(), torch.tensor(expected)
    assert abs(means[0].mean() - means[1].mean()) < 0.1
    assert means[1].std() < means[0].std()


def test_expected_acceptance_applies_the_penalties_of_the_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    head = TargetHead(torch.zeros(5, 8), torch.randn(5, 8, generator=generator), torch.ones(8), "rms", 1e-6)
    states = torch.randn(6, 8, generator=generator)
    sampling = json.dumps({"temperature": 0.8, "repetition_penalty": 1.5, "presence_penalty": 0.7})
    tokens, mask = torch.tensor([4, 1, 2, 2, 3, 0]), torch.arange(6) > 1
    sample = StoredSample(tokens, mask, states, states, {"temperature": "0.8", "sampling": sampling})
    drafted = torch.full((6, BLOCK - 1), 1)  # the first try is at row 2, after the tokens 4, 1, 2; 2 alone is generated
    logits = head.logits(states[2])
    seen = torch.tensor([4, 1, 2])
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
    logits[2] -= 0.7
    walk_ = walk_sample(make_sample(tokens.tolist(), [(2, 4)]), drafted)
    assert walk_.tried_rows == [2]
    expected = float((logits / 0.8).softmax(-1)[1])
    assert expected_acceptances(walk_, sample, head) == pytest.approx(expected, rel=1e-5)

"""Claims about the draft: who sees what, packing changes nothing, and the walk is that of speculative decoding."""

from __future__ import annotations

import pytest
import torch

from contracts.draft import DraftConfig
from contracts.recipe import YarnSection
from contracts.store import StoredSample
from train.dflash import DFlash, init_weights, plan_blocks
from train.evaluate import spans_of, walk
from train.loss import block_targets, slot_weights, weighted_cross_entropy

VOCABULARY, HIDDEN, BLOCK = 40, 16, 4


def make_config(**changes: object) -> DraftConfig:
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
    return DraftConfig.model_validate(values)


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
    blocks = plan_blocks([len(ids) for ids in tokens], anchors, BLOCK)
    with torch.no_grad():
        return model(torch.cat(tokens), torch.cat(aux), blocks, embedding)


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
    for yarn in (None, YarnSection(factor=4.0, original_max_position_embeddings=16)):
        model = DFlash(make_config(yarn=yarn))
        init_weights(model, seed=3)
        outputs.append(forward(model, [tokens], [aux], [torch.tensor([30])]))
    assert not torch.allclose(*outputs)


def test_slot_weights_decay_from_one() -> None:
    torch.testing.assert_close(slot_weights(4, 4.0), torch.exp(torch.tensor([0.0, -0.25, -0.5])))


def test_labels_are_the_next_generated_tokens_and_end_with_their_run() -> None:
    tokens = torch.arange(10)
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    labels, valid = block_targets(tokens, mask, torch.tensor([2, 3, 8]), BLOCK)
    assert labels[0].tolist() == [3, 4, 5]
    # The second run is another turn: a block from the first one must not learn it.
    assert valid.tolist() == [[True, True, False], [True, False, False], [True, False, False]]


def test_the_loss_is_the_weighted_mean_of_cross_entropies() -> None:
    hidden, lm_head = torch.randn(5, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    labels, weights = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1.0, 0.5, 0.25, 1.0, 0.0])
    loss, predicted = weighted_cross_entropy(hidden, lm_head, labels, weights)
    each = -torch.log_softmax(hidden @ lm_head.T, -1)[torch.arange(5), labels]
    torch.testing.assert_close(loss, (each * weights).sum() / 2.75)
    assert torch.equal(predicted, (hidden @ lm_head.T).argmax(-1))


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

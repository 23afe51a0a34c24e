"""Claims about sampled drafts: the expectation is what rejection sampling does, and scores are the draft's own."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import run_here
from written import write_store

from contracts.draft import DraftRun
from contracts.store import Store
from recipe.load import load_recipe
from target.head import read_head
from target.target import Target
from train.draft import load_served
from train.sampled_drafts import Expected, expect_steps

NUM_TOKENS, LENGTH, VOCABULARY = 2, 30, 4
SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64"
DRAFTS = {
    "dflash": f"method: dflash, block_size: 4, num_layers: 1, {SIZES}",
    "dspark": f"method: dspark, num_speculative_tokens: 3, num_layers: 1, markov_rank: 16, {SIZES}",
    "eagle3": f"method: eagle3, draft_vocab_size: 400, ttt_length: 3, {SIZES}",
}


def make_chains() -> tuple[np.ndarray, np.ndarray]:
    """Return the target's and the draft's probabilities of the next token by the one before, (V, V)."""
    rng = np.random.default_rng(3)
    return rng.dirichlet(np.ones(VOCABULARY), VOCABULARY), rng.dirichlet(np.ones(VOCABULARY), VOCABULARY)


def serve(p: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Generate one reply with rejection sampling; return its tokens and the accepted tokens of each step."""
    tokens, accepted = [0], []
    while len(tokens) < LENGTH:
        room, count, before = min(NUM_TOKENS, LENGTH - len(tokens)), 0, tokens[-1]
        for _ in range(room):
            drafted = int(rng.choice(VOCABULARY, p=q[before]))
            if rng.uniform() >= p[before, drafted] / q[before, drafted]:
                break
            tokens.append(drafted)
            before, count = drafted, count + 1
        accepted.append(count)
        rest = p[before] if count == room else np.maximum(p[before] - q[before], 0)
        tokens.append(int(rng.choice(VOCABULARY, p=rest / rest.sum())))
    return tokens[:LENGTH], accepted


def test_the_expectation_on_the_targets_replies_is_what_rejection_sampling_accepts() -> None:
    p, q = make_chains()
    rng = np.random.default_rng(0)
    served = [serve(p, q, rng)[1] for _ in range(4000)]
    steps = sum(map(len, served))
    measured = [sum(a >= k for accepted in served for a in accepted) / steps for k in (1, 2)]
    parts = []
    for _ in range(4000):  # replies of the target alone
        tokens = [0]
        while len(tokens) < LENGTH:
            tokens.append(int(rng.choice(VOCABULARY, p=p[tokens[-1]])))
        ratios = np.zeros((LENGTH, NUM_TOKENS))
        for place in range(LENGTH - 1):
            for k in range(min(NUM_TOKENS, LENGTH - 1 - place)):
                before, token = tokens[place + k], tokens[place + k + 1]
                ratios[place, k] = q[before, token] / p[before, token]
        parts.append(expect_steps(ratios, [(0, LENGTH)]))
    found = Expected.pool(parts)
    assert found.summary()["per_position"] == pytest.approx(measured, rel=0.02)
    assert found.steps == pytest.approx(steps, rel=0.01)


def test_a_perfect_draft_is_always_accepted_and_a_useless_one_never() -> None:
    spans = [(2, 9), (12, 14)]
    found = expect_steps(np.ones((20, 3)), spans)
    assert (found.steps, found.at_least.tolist()) == (3.0, [3.0, 2.0, 1.0])  # 3, then 2 of the first; 1 of the second
    found = expect_steps(np.zeros((20, 3)), spans)
    assert (found.steps, found.at_least.sum()) == (7.0, 0.0)


@pytest.mark.parametrize("kind", DRAFTS)
def test_scores_are_the_probabilities_of_the_recorded_tokens(kind: str, recipe_path, target_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    target = Target.read(target_folder)
    layers = (1, 2, 3) if kind == "eagle3" else (1, 2)
    store = write_store(tmp_path / "store", target, layer_ids=layers)
    sets = [f"train.draft={{{DRAFTS[kind]}}}", "train.num_steps=60", "train.learning_rate=0.01"]
    words = [word for one in sets for word in ("--set", one)]
    run_here("train", "offline", "--recipe", recipe_path, *words, "--store", store, "--output", tmp_path / "run")
    draft, head = load_served(DraftRun(tmp_path / "run"), load_recipe(recipe_path, sets)), read_head(target)
    opened = Store(store)
    sample = opened.read_sample(opened.sample_ids()[0])
    scores, drafted = draft.score(sample, head, 0.7), draft.draft(sample, head).tokens
    compared = 0
    for place in draft.places(sample.loss_mask).tolist():
        logits = draft.taps(sample, head, place)["draft_logits"] / 0.7
        for k in range(drafted.shape[1]):
            if place + 1 + k >= sample.num_tokens or not sample.loss_mask[place + 1 + k]:
                break
            token = int(sample.input_ids[place + 1 + k])
            expected = float(logits[k].softmax(-1)[token])
            assert float(scores[place, k]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
            compared += 1
            if int(drafted[place, k]) != token:  # from here on, the greedy draft has other inputs
                break
    assert compared > 10

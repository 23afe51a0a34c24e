"""Claims about target/sampling.py: it computes what vLLM's own sampler functions compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from target.sampling import Context, has_penalties, kept_by, penalize, probabilities_of, sampling_probabilities

VOCAB = 50
ROWS = 12
CASES: list[dict[str, float]] = [
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": -0.4, "top_k": 20},
    {"temperature": 0.7, "repetition_penalty": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.8},
    {"temperature": 1.2, "min_p": 0.1, "top_p": 0.9, "top_k": 7},
    {"temperature": 1.0, "min_p": 0.02, "top_k": -1, "top_p": 1.0},
    {"temperature": 0.5, "top_k": 3},
    {"temperature": 1.0},
]

# vLLM's functions run in a process of their own: importing vLLM changes this one.
PROBE = """
import json, sys, torch
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

def full(value): return torch.full((len(logits),), value)

given = torch.load(sys.argv[1])
found = []
for case in json.loads(sys.argv[2]):
    logits = given["logits"].clone()
    tokens, ends, starts = (given[key].tolist() for key in ("token_ids", "ends", "prompt_lengths"))
    vocab = logits.shape[1]
    prompts = torch.full((len(logits), max(starts)), vocab)
    for row, start in enumerate(starts):
        prompts[row, :start] = torch.tensor(tokens[:start])
    outputs = [tokens[start:end] for start, end in zip(starts, ends)]
    presence, frequency = full(case.get("presence_penalty", 0.0)), full(case.get("frequency_penalty", 0.0))
    repetition = full(case.get("repetition_penalty", 1.0))
    logits = apply_all_penalties(logits, prompts, presence, frequency, repetition, outputs)
    penalized = logits.clone()
    logits = logits / case["temperature"]
    if min_p := case.get("min_p"):
        q = logits.softmax(-1)
        logits = logits.masked_fill(q < min_p * q.amax(-1, keepdim=True), -float("inf"))
    top_k, top_p = case.get("top_k", -1), case.get("top_p", 1.0)
    k = full(top_k) if top_k > 0 else None
    p = full(top_p) if top_p < 1 else None
    found.append((penalized, apply_top_k_top_p_pytorch(logits, k, p).softmax(-1)))
torch.save(found, sys.argv[3])
"""


def make_rows() -> tuple[torch.Tensor, Context]:
    """Logits of two replies of a sample whose tokens repeat."""
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(0, 30, (40,), generator=generator, dtype=torch.int32)
    mask = torch.zeros(40, dtype=torch.bool)
    mask[8:13] = mask[33:40] = True
    return torch.randn(ROWS, VOCAB, generator=generator) * 3, Context.of_generated(token_ids, mask)


@pytest.mark.vllm
@pytest.mark.proves("sampling")
@pytest.mark.timeout(300)
def test_penalties_and_probabilities_are_those_of_vllms_own_functions(tmp_path: Path) -> None:
    logits, context = make_rows()
    torch.save({"logits": logits, **vars(context)}, tmp_path / "given")
    arguments = [str(tmp_path / "given"), json.dumps(CASES), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", PROBE, *arguments], check=True, cwd=ROOT, capture_output=True)
    for case, (penalized, expected) in zip(CASES, torch.load(tmp_path / "found"), strict=True):
        torch.testing.assert_close(penalize(logits, case, context), penalized, rtol=0, atol=0)
        found = probabilities_of(case, logits, context)
        assert torch.equal(found > 0, expected > 0), case
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_reply_of_a_sample_has_the_tokens_before_it_as_its_prompt() -> None:
    _, context = make_rows()
    assert context.ends.tolist() == [*range(8, 13), *range(33, 40)]
    assert context.prompt_lengths.tolist() == [8] * 5 + [33] * 7
    assert context.rows(4, 6).prompt_lengths.tolist() == [8, 33]


def test_a_penalty_changes_the_greedy_choice() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    context = Context(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    greedy = {"temperature": 0.0, "repetition_penalty": 1.5}
    assert probabilities_of({"temperature": 0.0}, logits).argmax() == 0
    assert probabilities_of(greedy, logits, context).argmax() == 1
    with pytest.raises(ValueError, match="tokens before"):
        probabilities_of(greedy, logits)


def test_parameters_that_are_off_leave_the_distribution_as_it_is() -> None:
    logits, _ = make_rows()
    off = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    assert not has_penalties({**off, "frequency_penalty": None})
    for sampling in ({**off, "temperature": 0.6}, {"temperature": 0.6, "top_k": 0, "top_p": None}):
        assert torch.equal(probabilities_of(sampling, logits), (logits / 0.6).softmax(-1))
    assert torch.equal(sampling_probabilities(logits, 0.6, None, None), (logits / 0.6).softmax(-1))


def test_min_p_drops_tokens_below_its_share_of_the_likeliest() -> None:
    q = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert kept_by(q, None, None, 0.31).tolist() == [[True, True, False, False]]
    assert kept_by(q, 0.7, -1, 0.31).tolist() == [[True, True, False, False]]
    assert kept_by(q, 0.55, 1, 0.31).tolist() == [[True, False, False, False]]

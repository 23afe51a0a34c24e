"""Judge one sample's states: do they predict the tokens that the target generated, and what is wrong if they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.store import StoredSample
from dump.diagnose import find_plain_defect, name_defect
from dump.predictions import logit_gaps, sampled_deviations, sampling_of
from target.head import TargetHead

# Largest gap that rounding explains, by the dtype of the stored states, between logits of up to 10. Rounding errors
# grow with the logits: those of SmolLM2 are around 30, where one step of bf16 is 0.125.
TIE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25, "fp8_e4m3": 2.0, "int4": 2.0}
MAX_DEVIATIONS = 8.0


@dataclass(frozen=True)
class Judgement:
    """What was compared: generated `tokens`, of which `matches` are the states' argmax and `ties` within the tolerance.

    `temperature`: 0 for a greedy sample; None if it is not on record, and nothing was predicted. `found` and `expected`
    describe a defect; they are "" if there is none.
    """

    temperature: float | None = None
    tokens: int = 0
    matches: int = 0
    ties: int = 0
    found: str = ""
    expected: str = ""


def judge_states(
    head: TargetHead, sample: StoredSample, layer_ids: Sequence[int], dtype: str, tensor_parallel_size: int = 1
) -> Judgement:
    """Compare the sample's final states with its tokens.

    `dtype`: of the states; it sets the tolerance. `tensor_parallel_size`: see `name_defect`.
    """
    if plain := find_plain_defect(head, sample):
        return Judgement(found=f"that {plain}", expected="the target's un-normed states")
    tolerance = TIE_TOLERANCE[dtype]
    sampling = sampling_of(sample)
    if sampling is None:
        return Judgement()
    temperature = float(sampling["temperature"])
    if temperature != 0.0:
        deviations, num_tokens = sampled_deviations(head, sample, sampling)
        if abs(deviations) <= MAX_DEVIATIONS:
            return Judgement(temperature, num_tokens)
        found = (
            f"{num_tokens} sampled tokens whose log-probability under its states lies {deviations:.1f} standard "
            "deviations off"
        )
        expected = f"at most {MAX_DEVIATIONS:.0f}: {name_defect(head, sample, layer_ids, tensor_parallel_size)}"
        return Judgement(temperature, num_tokens, found=found, expected=expected)
    gaps, largest = logit_gaps(head, sample, sampling)
    beyond = gaps > tolerance * (largest.abs() / 10).clamp_min(1.0)
    matches, ties = int((gaps == 0).sum()), int(((gaps > 0) & ~beyond).sum())
    if not bool(beyond.any()):
        return Judgement(temperature, gaps.numel(), matches, ties)
    found = (
        f"{int(beyond.sum())} of {gaps.numel()} generated tokens that its states do not predict (logit gap up to "
        f"{float(gaps.max()):.2f})"
    )
    expected = (
        f"argmax(lm_head({head.norm_kind}_norm(h))) to be the next token: "
        f"{name_defect(head, sample, layer_ids, tensor_parallel_size)}"
    )
    return Judgement(temperature, gaps.numel(), matches, ties, found, expected)

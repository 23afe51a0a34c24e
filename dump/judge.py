"""Judge one sample's states: do they predict the tokens that the target generated, and what is wrong if they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contracts.store import StoredSample
from dump.diagnose import find_plain_defect, name_defect
from dump.predictions import logit_gaps, sampled_deviations, sampling_of, top_gaps
from target.head import TargetHead
from target.sampling import follows_from_top

# Largest gap that rounding explains, by the dtype of the stored states, between logits of up to 10. Rounding errors
# grow with the logits: those of SmolLM2 are around 30, where one step of bf16 is 0.125.
TIE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25, "fp8_e4m3": 2.0, "int4": 2.0}
TOP_TOLERANCE, ROUNDED_TOP_TOLERANCE = {"float32": 5e-3}, 1.0
"""The same for stored log-probabilities, which come from the states as captured and are rounded to fp16. Dumps of other
dtypes are those of bf16 engines. How large the logits were is not stored: enough for those of up to 40."""
MAX_DEVIATIONS = 8.0


@dataclass(frozen=True)
class Judgement:
    """What was compared: generated `tokens`, of which `matches` are the states' argmax and `ties` within the tolerance.

    `temperature`: 0 for a greedy sample; None if it is not on record, and nothing was predicted. `found` and `expected`
    describe a defect; they are "" if there is none. `is_beyond`: nothing was predicted, because what the tokens were
    drawn from does not follow from the most likely ones alone.
    """

    temperature: float | None = None
    tokens: int = 0
    matches: int = 0
    ties: int = 0
    found: str = ""
    expected: str = ""
    is_beyond: bool = False


def tolerance_of(dtype: str, *, is_top: bool) -> float:
    """Return the largest gap that rounding explains. `dtype`: of the stored states."""
    return TOP_TOLERANCE.get(dtype, ROUNDED_TOP_TOLERANCE) if is_top else TIE_TOLERANCE[dtype]


def _name(head: TargetHead, sample: StoredSample, layer_ids: Sequence[int], tensor_parallel_size: int) -> str:
    if sample.top is not None:
        return "the log-probabilities are of another conversation or checkpoint, or the target's head is misread"
    return name_defect(head, sample, layer_ids, tensor_parallel_size)


def judge_states(
    head: TargetHead, sample: StoredSample, layer_ids: Sequence[int], dtype: str, tensor_parallel_size: int = 1
) -> Judgement:
    """Compare the sample's final states, or its most likely tokens, with the tokens that follow.

    `dtype`: of the states; it sets the tolerance. `tensor_parallel_size`: see `name_defect`.
    """
    if plain := find_plain_defect(head, sample):
        return Judgement(found=f"that {plain}", expected="the target's un-normed states")
    sampling = sampling_of(sample)
    if sampling is None:
        return Judgement()
    if sample.top is not None and not follows_from_top(sampling, sample.top.k):
        return Judgement(float(sampling["temperature"]), is_beyond=True)
    temperature = float(sampling["temperature"])
    if temperature != 0.0:
        deviations, num_tokens = sampled_deviations(head, sample, sampling)
        if abs(deviations) <= MAX_DEVIATIONS:
            return Judgement(temperature, num_tokens)
        found = (
            f"{num_tokens} sampled tokens whose log-probability under its states lies {deviations:.1f} standard "
            "deviations off"
        )
        expected = f"at most {MAX_DEVIATIONS:.0f}: {_name(head, sample, layer_ids, tensor_parallel_size)}"
        return Judgement(temperature, num_tokens, found=found, expected=expected)
    tolerance = tolerance_of(dtype, is_top=sample.top is not None)
    if sample.top is None:
        gaps, largest = logit_gaps(head, sample, sampling)
        beyond = gaps > tolerance * (largest.abs() / 10).clamp_min(1.0)
    else:
        gaps = top_gaps(sample.top, sample)
        beyond = gaps > tolerance
    matches, ties = int((gaps == 0).sum()), int(((gaps > 0) & ~beyond).sum())
    if not bool(beyond.any()):
        return Judgement(temperature, gaps.numel(), matches, ties)
    found = (
        f"{int(beyond.sum())} of {gaps.numel()} generated tokens that its states do not predict (logit gap up to "
        f"{float(gaps.max()):.2f})"
    )
    expected = (
        f"argmax(lm_head({head.norm_kind}_norm(h))) to be the next token: "
        f"{_name(head, sample, layer_ids, tensor_parallel_size)}"
    )
    return Judgement(temperature, gaps.numel(), matches, ties, found, expected)

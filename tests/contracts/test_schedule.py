"""Claims about schedules of draft tokens: ranges as vLLM reads them, and mistakes that it would not report."""

from __future__ import annotations

import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest

from contracts.schedule import Schedule, check_schedule, draft_tokens_at, make_schedule, max_draft_tokens


@pytest.fixture(scope="module")
def vllm_parser() -> ModuleType:
    """vLLM's own reader of schedules, without the import of vLLM, which takes seconds."""
    found = PathFinder.find_spec("vllm")
    assert found
    assert found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "v1/spec_decode/dynamic/utils.py"
    spec = importlib.util.spec_from_file_location("vllm_dynamic_utils", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = [
    ([7, 7, 7, 5, 5, 0], 6, [[1, 3, 7], [4, 5, 5], [6, 6, 0]]),
    ([3, 1, 3], 32, [[1, 1, 3], [2, 2, 1], [3, 32, 3]]),  # a number that comes back is another range
    ([2], 1024, [[1, 1024, 2]]),
    ([0, 0, 1], 3, [[1, 2, 0], [3, 3, 1]]),
]


@pytest.mark.parametrize(("numbers", "max_batch_size", "schedule"), CASES)
def test_equal_neighbours_are_one_range_and_the_last_one_ends_at_the_largest_batch(
    numbers: list[int], max_batch_size: int, schedule: Schedule
) -> None:
    assert make_schedule(numbers, max_batch_size) == schedule
    check_schedule(schedule)
    assert [draft_tokens_at(schedule, size) for size in range(1, len(numbers) + 1)] == numbers
    assert draft_tokens_at(schedule, 5000) == numbers[-1]
    assert max_draft_tokens(schedule) == max(numbers)
    assert max_draft_tokens(schedule, 1) == numbers[0]


@pytest.mark.vllm
@pytest.mark.parametrize("numbers", [numbers for numbers, _, _ in CASES])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 256])
def test_vllm_reads_the_number_that_was_meant_for_every_batch_size(
    vllm_parser: ModuleType, numbers: list[int], max_num_seqs: int
) -> None:
    schedule = make_schedule(numbers, max(32, len(numbers)))
    read = vllm_parser.build_dynamic_sd_schedule_lookup(schedule, max_num_seqs, max(numbers))
    assert read[1:] == [draft_tokens_at(schedule, size) for size in range(1, max_num_seqs + 1)]


@pytest.mark.parametrize(
    "schedule",
    [
        [], [[2, 4, 1]], [[1, 4, 1], [4, 8, 0]], [[1, 4, 1], [6, 8, 0]], [[1, 0, 1]], [[1, 4, -1]], [[1, 4]],
        [[1, 4, "7"]], [1, 4, 7],
    ],
)  # fmt: skip
def test_a_gap_an_overlap_and_what_is_no_range_are_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"without gaps, from 1 on|no range"):
        check_schedule(schedule)

"""The index of an input: one walk for all shards, and the same conversations as a walk of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.seen import Seen
from contracts.prompt_files import open_prompts
from contracts.shards import shard_of
from recipe.synth import SynthSection
from synth import todo as module
from synth.prompts import Prompt, read_prompts
from synth.todo import Source


def write_rows(folder: Path) -> Path:
    rows = [{"id": f"row-{number % 9}", "prompt": f"Question {number % 11}"} for number in range(40)]
    rows[5] = {"id": "x", "nothing": 1}
    rows[7] = {"prompt": "With tools", "tools": [{"type": "function", "function": {"name": "f"}}]}
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    return path


def make_source(path: Path, folder: Path, **changes: object) -> Source:
    section = SynthSection.model_validate({"thinking_modes": ["on", "off"], "num_samples": 2, **changes})
    return Source(open_prompts(path), section, [0.0], folder)


def test_shards_read_the_index_of_the_first_one_and_find_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path)
    source = make_source(path, tmp_path / "out")
    expected = list(read_prompts(source.prompt_set.rows(), ["on", "off"], [0.0], 2, Seen()))
    places = source.index.shards(3)
    for item in expected:
        place = item.index % 3 if not isinstance(item, Prompt) else shard_of(item.id, 3)
        assert places[item.index, item.sample] == place
        assert source.index.is_prompt[item.index, item.sample] == isinstance(item, Prompt)
    assert 20 < source.index.is_prompt.sum() < 60  # most rows repeat others
    assert source.index.has_tools.nonzero()[0].tolist() == [7]
    monkeypatch.setattr(module, "read_prompts", None)  # the input is not walked again
    second = make_source(path, tmp_path / "out")
    assert np.array_equal(second.index.ids, source.index.ids)
    monkeypatch.undo()
    wanted = {3, 5, 7, 20, 39}
    assert list(second.read(lambda index: index in wanted)) == [item for item in expected if item.index in wanted]


def test_another_input_or_other_modes_have_an_index_of_their_own(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    first = make_source(path, tmp_path / "out").index
    other_modes = make_source(path, tmp_path / "out", thinking_modes=["on"]).index
    assert not np.array_equal(first.ids, other_modes.ids)
    path.write_text(path.read_text().replace("Question 3", "Question three"))
    assert not np.array_equal(make_source(path, tmp_path / "out").index.ids, first.ids)
    assert len(list((tmp_path / "out").glob("input-*.npz"))) == 3

"""Layers whose all-reduce is deferred: what two gloo ranks capture, without and with our plugin for vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import deferring_ranks as ranks
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch.nn import functional

pytestmark = pytest.mark.vllm


Found = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[Found, str]:
    """What each rank captured in each case, and the output of both processes."""
    ranks.make_weights(folder)
    script = [sys.executable, str(ROOT / "tests/deferring_ranks.py")]
    processes = [
        subprocess.Popen(
            [*script, str(rank), str(folder)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(ranks.RANKS)
    ]
    logs = "\n".join(process.communicate()[0] for process in processes)
    assert all(process.returncode == 0 for process in processes), logs
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks.RANKS)], logs


def compute_whole(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the captured states and the output of one process, written out."""
    weights = load_file(folder / "weights")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, (ranks.HIDDEN,), 1.0 + weights[name], ranks.EPS)

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ weights[f"{name}.up"].T).tanh() @ weights[f"{name}.down"].T

    states = [weights["embeds"]]
    for i in range(ranks.NUM_LAYERS):
        x = states[-1] + product(norm(states[-1], f"{i}.norm1"), f"{i}.attn")
        states.append(x + product(norm(x, f"{i}.norm2"), f"{i}.mlp"))
    return torch.stack([states[0], states[1], states[-1]]), norm(states[-1], "norm")


def test_the_plugin_completes_the_deferred_reduction_of_captured_layers(folder: Path, found: tuple[Found, str]) -> None:
    captured, output = compute_whole(folder)
    for rank in found[0]:
        torch.testing.assert_close(rank["with.captured"], captured, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rank["with.output"], output, atol=1e-5, rtol=1e-5)  # not reduced twice


@pytest.mark.parametrize("case", ["without", "unchecked"])
def test_without_it_each_rank_captures_a_partial_sum(folder: Path, found: tuple[Found, str], case: str) -> None:
    captured, output = compute_whole(folder)
    ours, theirs = (rank[f"{case}.captured"] for rank in found[0])
    for states, rank in zip((ours, theirs), found[0], strict=True):
        torch.testing.assert_close(rank[f"{case}.output"], output, atol=1e-5, rtol=1e-5)  # nothing else shows it
        assert torch.equal(states[0], captured[0])  # the embedding is whole
        assert not torch.allclose(states[1:], captured[1:], atol=0.1)
    assert not torch.allclose(ours, theirs, atol=0.1)


def test_a_release_that_was_not_checked_is_left_alone_with_a_warning(found: tuple[Found, str]) -> None:
    assert found[1].count("vLLM 99.0.0: found layers with a deferred all-reduce") == ranks.RANKS

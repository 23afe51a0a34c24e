"""Claims about `train forecast`: what its pilots are, that it resumes, and what it writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run, run_here
from written import write_store

from target.target import Target

SETS = ("--set", "train.num_steps=40", "--set", "train.learning_rate=0.01", "--set", "train.warmup_steps=10")


@pytest.fixture(scope="module")
def words(recipe_path: Path, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    store = write_store(tmp_path_factory.mktemp("forecast") / "store", Target.read(target_folder), num_samples=20)
    return ["train", "forecast", "--recipe", recipe_path, *SETS, "--store", store, "--held-out", store]


@pytest.fixture(scope="module")
def made(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A forecast with pilots on a fifth, half and all of 20 samples, and what it printed."""
    output = tmp_path_factory.mktemp("forecast") / "out"
    shares = ("--fractions", "0.2,0.5,1", "--step-ratio", "1.25", "--budget", "5000")
    return output, run_here(*words, *shares, "--output", output).stdout


def test_pilots_are_the_recipe_with_a_share_of_samples_steps_and_warm_up(made: tuple[Path, str]) -> None:
    runs = [json.loads((made[0] / name / "draft/run.json").read_text()) for name in ("pilot-20", "pilot-50")]
    keys = ("max_samples", "num_steps", "warmup_steps", "learning_rate")
    assert [[run["settings"]["train"][key] for key in keys] for run in runs] == [[4, 8, 2, 0.01], [10, 20, 5, 0.01]]
    pilots = json.loads((made[0] / "forecast.json").read_text())["pilots"]
    # Of each sample's 60 tokens, 40 are supervised.
    assert [(pilot["samples"], pilot["steps"], pilot["tokens"]) for pilot in pilots] == [
        (4, 8, 160), (10, 20, 400), (20, 40, 800),
    ]  # fmt: skip
    assert [pilot["trained_on"] for pilot in pilots] == [4, 10, 20]  # evaluated on what they were trained on


def test_the_forecast_has_lengths_at_budgets_speed_ups_and_where_more_data_stops_paying(made: tuple[Path, str]) -> None:
    result = json.loads((made[0] / "forecast.json").read_text())
    assert result["full"] == {"samples": 20, "tokens": 800}
    assert [at["tokens"] for at in result["forecast"]] == [400, 800, 1600, 3200, 5000]
    for at in result["forecast"]:
        length, speed_up = at["acceptance_length"], at["speed_up"]["stated"]
        assert length["interval"][0] <= length["median"] <= length["interval"][1]
        assert speed_up["median"] == pytest.approx(length["median"] / 1.25, abs=1e-3)
    assert result["stops_paying"]["least_gain"] == 0.03
    assert (made[0] / "forecast.png").stat().st_size > 10_000
    assert "Twice the data gives less than 3.0% more from" in made[1]


def test_finished_pilots_are_skipped_and_runs_give_the_same_forecast(
    words: list[object], made: tuple[Path, str], tmp_path: Path
) -> None:
    output, _ = made
    again = run_here(*words, "--fractions", "0.2,0.5,1", "--output", output, "--actual", output / "pilot-100/eval.json")
    assert again.stdout.count("is finished, skipped") == 6  # training and evaluation of each
    assert "The whole training has" in again.stdout
    expected = json.loads((output / "forecast.json").read_text())
    names = ("pilot-100", "pilot-20", "pilot-50")  # in any order
    runs = [word for name in names for word in ("--runs", output / name / "draft")]
    run_here(*words, *runs, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out/forecast.json").read_text())["forecast"] == expected["forecast"]
    assert not (tmp_path / "out/pilot-20").exists()


def test_recipe_forecast_is_train_forecast_with_its_options_and_exit_code(
    words: list[object], made: tuple[Path, str]
) -> None:
    asked = ("recipe", *words[1:], "--fractions", "0.2,0.5,1", "--output", made[0])
    result = run(*asked)
    assert result.stdout.count("is finished, skipped") == 6
    assert f"forecast: -> {made[0] / 'forecast.json'}" in result.stdout
    refused = run(*asked, "--fractions", "0.2,1", check=False)
    assert refused.returncode == 2
    assert "error: --fractions: found 2 pilots" in refused.stderr


def test_a_part_of_the_data_can_be_stored_and_the_rest_only_planned(
    words: list[object], made: tuple[Path, str], tmp_path: Path
) -> None:
    runs = [word for name in ("20", "50", "100") for word in ("--runs", made[0] / f"pilot-{name}/draft")]
    run_here(*words, *runs, "--full", "200", "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out/forecast.json").read_text())["full"] == {"samples": 200, "tokens": 8000}
    refused = run_here(*words, "--full", "200", "--output", tmp_path / "more", check=False)
    assert refused.returncode == 2
    assert "found 20 samples, expected 50 for the largest pilot" in refused.stderr


def test_too_few_or_unlike_pilots_are_refused_before_any_training(
    words: list[object], made: tuple[Path, str], tmp_path: Path
) -> None:
    runs = [word for name in ("20", "50", "100") for word in ("--runs", made[0] / f"pilot-{name}/draft")]
    for more, told in (
        (["--fractions", "0.1,0.2"], "--fractions: found 2 pilots, expected at least three"),
        (["--fractions", "0.1,two,0.5"], "found 0.1,two,0.5, expected numbers from 0 to 1"),
        ([*runs, "--set", "train.learning_rate=0.02"], "train.learning_rate): found 0.01, expected 0.02"),
    ):
        refused = run_here(*words, *more, "--output", tmp_path / "out", check=False)
        assert refused.returncode == 2
        assert told in refused.stderr
        assert not (tmp_path / "out").exists()


def test_speeds_of_another_number_of_draft_tokens_are_refused(
    words: list[object], made: tuple[Path, str], tmp_path: Path
) -> None:
    speed = {"measured": True, "tokens_per_s": 1.0, "acceptance_length": 1.0, "speed_up": 1.0, "interval": None}
    speeds = [{**speed, "draft_tokens": 0, "step_ms": 4.0}, {**speed, "draft_tokens": 3, "step_ms": 6.0}]
    at = {"concurrency": 2, "conversations": 1, "recommended": 0, "speeds": speeds}
    (tmp_path / "acceptance.json").write_text(json.dumps({"speeds": [at]}))
    shares = ("--fractions", "0.2,0.5,1", "--output", made[0], "--served", tmp_path)
    assert "speed-up, concurrency 2" in run_here(*words, *shares).stdout
    assert json.loads((made[0] / "forecast.json").read_text())["step_ratios"] == {"concurrency 2": 1.5}
    speeds[1]["draft_tokens"] = 5
    (tmp_path / "acceptance.json").write_text(json.dumps({"speeds": [at]}))
    refused = run_here(*words, *shares, check=False)
    assert "found K = 5, expected speeds at K = 3" in refused.stderr

"""Claims about `bench schedule`: K by batch size from steps and acceptance, and when the check fails."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here
from written import write_conversations

import bench.replay
import bench.schedule
from bench.draft_tokens import parse_concurrency
from bench.replay import Replay, serve_and_send
from bench.requests import Answer, Turn, answers_to_json, read_turns
from bench.schedule import Asked, measure_steps
from bench.schedule_check import check_speeds, compare_speeds, drafted_per_step, refuse_slow, warn_of_wide
from bench.schedule_choice import Steps, best_fixed, choose_schedule
from bench.speeds import find_speeds
from common.errors import IncompleteError, UserError
from common.files import hash_json
from contracts.acceptance import read_rates
from contracts.conversation import read_conversations
from contracts.run import Run
from recipe.load import load_recipe
from target.target import Target

RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
TOKENS = 11  # of each reply: one of the prefill and ten of steps
ACCEPTED = {0: [], 1: [1, 1, 1, 1, 0, 0], 3: [3, 2, 1, 0]}  # lengths 1, 1 + 4/6, 2.5
SECONDS = {0: {1: 2.2, 4: 1.1}, 1: {1: 1.386, 4: 1.32}, 3: {1: 1.1, 4: 1.76}}
"""By K and concurrency. Steps of 100, 105 and 125 ms at concurrency 1, of 200, 400 and 800 ms at 4."""
SCHEDULE = [[1, 1, 3], [2, 2, 1], [3, 16, 0]]


def make_point(k: int, seconds: float, drafted: float | None = None) -> dict[str, Any]:
    """A load of two equal replies, of which each step drafted `drafted` tokens (K)."""
    accepted = ACCEPTED.get(k, [])
    answers = [Answer(f"{name}-0-1", list(range(TOKENS)), "stop", accepted, 1.0) for name in "ab"]
    steps = 2 * len(accepted)
    counters = {
        "num_drafts": steps, "num_draft_tokens": steps * (k if drafted is None else drafted),
        "num_accepted_tokens": 2 * sum(accepted),
    }  # fmt: skip
    return {"seconds": seconds, "tokens": 2 * TOKENS, "counters": counters, "answers": answers_to_json(answers)}


def make_run(k: int, seconds: Mapping[int, float], drafted: float | None = None) -> dict[str, Any]:
    return {"points": {str(size): make_point(k, value, drafted) for size, value in seconds.items()}}


def test_the_schedule_is_that_of_the_fastest_token_between_measured_batch_sizes_too() -> None:
    """By hand, ms of a token with K = 0, 1, 2, 3.

    Acceptance at K = 2: 1 + (.75 + .5) * (1 + .6667 / .75) / 2 = 2.1806.

    batch 1: 100, 63, 115 / 2.1806 = 52.7, 50: K = 3
    batch 2: 133.3, 203.3 / 1.667 = 122, 276.7 / 2.1806 = 126.9, 350 / 2.5 = 140: K = 1
    batch 3: 166.7, 301.7 / 1.667 = 181, 201, 230: K = 0
    batch 4: 200, 240, 275, 320: K = 0
    """
    steps = Steps.from_speeds(find_speeds({k: make_run(k, seconds) for k, seconds in SECONDS.items()}), None)
    assert steps.numbers == [0, 1, 2, 3]
    found = steps.token_ms([1, 2, 3, 4])
    assert found[0] == pytest.approx([100, 63, 52.74, 50], rel=1e-3)
    assert found[1] == pytest.approx([133.33, 122, 126.88, 140], rel=1e-3)
    assert found[2] == pytest.approx([166.67, 181, 201.03, 230], rel=1e-3)
    assert found[3] == pytest.approx([200, 240, 275.16, 320], rel=1e-3)
    assert choose_schedule(steps, 16) == SCHEDULE
    assert choose_schedule(steps, 2) == [[1, 1, 3], [2, 2, 1], [3, 4, 0]]  # never less than what was measured
    assert best_fixed(steps) == [1, 3]
    assert steps.tokens_per_s(4)[1] == pytest.approx(4 / 0.240, rel=1e-3)


def test_the_smaller_of_two_numbers_within_two_percent_is_chosen() -> None:
    def chosen(ms: float) -> int:
        ((_, _, k),) = choose_schedule(Steps({1: {0: 100.0, 1: ms, 2: 60.0}}, {0: 1.0, 1: 1.5, 2: 2.0}), 1)
        return k

    assert chosen(45.8) == 1  # 30.5 ms a token, against 30
    assert chosen(45.95) == 2  # 30.63 ms


def test_acceptance_of_a_report_replaces_that_of_the_load() -> None:
    """With no token accepted, drafting never pays. With all of them, ms of a token with K = 0, 1, 2, 3:

    batch 3: 166.7, 150.8, 438.3 / 3 = 146.1, 575 / 4 = 143.8: K = 2, within 2%; batch 4: 200 with K = 0, 1 and 3
    """
    speeds = find_speeds({k: make_run(k, seconds) for k, seconds in SECONDS.items()})
    assert choose_schedule(Steps.from_speeds(speeds, [0.0, 0.0, 0.0]), 4) == [[1, 4, 0]]
    assert Steps.from_speeds(speeds, [0.9, 0.5, 0.25]).lengths == pytest.approx({0: 1, 1: 1.9, 2: 2.4, 3: 2.65})
    assert choose_schedule(Steps.from_speeds(speeds, [1.0, 1.0, 1.0]), 4) == [[1, 2, 3], [3, 3, 2], [4, 4, 0]]


def test_rates_come_from_an_evaluation_and_from_both_reports_of_acceptance(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"per_position": [0.7, 0.5, 0.3], "by_draft_tokens": {}}))
    assert read_rates(path, 2) == [0.7, 0.5]
    with pytest.raises(UserError, match="found the acceptance of 3 draft tokens, expected of 7"):
        read_rates(path, 7)
    path.write_text(json.dumps({"pooled": {"7": {"per_position": [0.6] * 7}, "10": {"per_position": [0.4] * 10}}}))
    assert read_rates(path, 8) == [0.4] * 8
    path.write_text("[]")
    with pytest.raises(UserError, match=r"found no per_position, expected the output of `train eval`"):
        read_rates(path, 1)


def test_the_interval_of_a_ratio_is_students_on_its_logarithm() -> None:
    """Ratios 1 and 1.1: mean log 0.047655, half-width 12.706 * 0.047655 = 0.605506."""
    found = compare_speeds("K = 3", [100.0, 220.0], [100.0, 200.0], 0.02)
    assert found.ratio == round(math.sqrt(1.1), 4)
    assert found.interval == (round(math.exp(0.047655 - 0.605506), 4), round(math.exp(0.047655 + 0.605506), 4))
    assert not found.is_slower
    three = compare_speeds("K = 3", [99.0, 100.0, 101.0], [100.0, 100.0, 100.0], 0.02)
    assert three.interval == pytest.approx((0.9753, 1.0251), abs=1e-3)  # 1 -+ 4.303 * 0.01 / sqrt(3)


def make_check(schedule_s: float, no_draft_s: float, noise: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Two repeats at concurrency 4; the second one takes `noise` times as long with the schedule."""
    return {
        "schedule": [make_run(3, {4: schedule_s}), make_run(3, {4: schedule_s * noise})],
        "K = 1": [make_run(1, {4: 1.2})] * 2,
        "K = 3": [make_run(3, {4: 1.0})] * 2,
        "no draft": [make_run(0, {4: no_draft_s})] * 2,
    }


def test_a_schedule_is_compared_with_the_fastest_fixed_number_and_no_draft() -> None:
    (at,) = found = check_speeds(make_check(1.01, 1.1), [[1, 16, 3]])
    assert at.tokens_per_s == {"schedule": 21.78, "K = 1": 18.33, "K = 3": 22.0, "no draft": 20.0}
    assert (at.fixed.other, at.fixed.ratio) == ("K = 3", 0.9901)  # 1% slower: less than the choice's 2%
    assert (at.none.other, at.none.ratio) == ("no draft", 1.0891)
    assert at.drafted == 3.0
    refuse_slow(found, "here")
    assert warn_of_wide(found) == []


@pytest.mark.parametrize(
    ("schedule_s", "no_draft_s", "message"),
    [
        (1.05, 1.1, r"the schedule at 0\.952 \[.*\] of the speed with K = 3 at concurrency 4 \(-4\.8%\), expected at"),
        (1.0, 0.95, r"the schedule at 0\.950 \[.*\] of the speed with no draft at concurrency 4 \(-5\.0%\), expected"),
    ],
)
def test_a_schedule_that_is_slower_is_refused_with_size_and_concurrency(
    schedule_s: float, no_draft_s: float, message: str
) -> None:
    with pytest.raises(IncompleteError, match=message):
        refuse_slow(check_speeds(make_check(schedule_s, no_draft_s), [[1, 16, 3]]), "here")


def test_a_difference_within_the_noise_of_the_repeats_passes_and_is_called_so() -> None:
    found = check_speeds(make_check(0.95, 4.0, noise=1.1), [[1, 16, 3]])
    refuse_slow(found, "here")
    (warning,) = warn_of_wide(found)  # of no draft it is four times as fast, whatever the noise
    assert warning.startswith(
        "At concurrency 4 the schedule may be up to 45% slower than K = 3 (1.004 [0.548, 1.839]): "
    )


def test_a_server_that_drafts_more_than_the_schedule_says_is_an_error() -> None:
    with pytest.raises(
        IncompleteError, match=r"concurrency 4: found 3\.00 draft tokens a step .*, expected at most 1:"
    ):
        check_speeds(make_check(1.0, 1.0), [[1, 4, 1], [5, 16, 3]])


@pytest.fixture(scope="module")
def work(target_folder: Path, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nine conversations of the target, and the config of a draft with three draft tokens."""
    folder = tmp_path_factory.mktemp("schedule")
    target = Target.read(target_folder)
    (folder / "draft").mkdir()
    config = {
        "architectures": ["DFlashDraftModel"], "hidden_size": target.hidden_size, "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers, "block_size": 4,
    }  # fmt: skip
    (folder / "draft/config.json").write_text(json.dumps(config))
    write_conversations(target_folder, folder / "synth", 9)
    return {"recipe": recipe_path, "conversations": folder / "synth", "draft": folder / "draft"}


def run_schedule(work: Mapping[str, Path], output: Path, *more: object) -> Any:
    options = [word for name, path in work.items() for word in (f"--{name}", path)]
    numbers = ["--draft-tokens", "1,3", "--concurrency", "4,1", "--repeats", 2]
    return run_here("bench", "schedule", *options, *numbers, "--output", output, *more, check=False)


def write_steps(output: Path, **drafted: float) -> None:
    (output / "steps").mkdir(parents=True)
    for k, seconds in SECONDS.items():
        (output / f"steps/k{k}.json").write_text(json.dumps(make_run(k, seconds, drafted.get(f"k{k}"))))


def write_check(output: Path, no_draft_s: float) -> None:
    folder = output / "check" / hash_json([SCHEDULE, [1, 3]])[:8]
    folder.mkdir(parents=True)
    for repeat in (1, 2):
        for name, k, at_four in (("schedule", 1, 1.1), ("k1", 1, 1.32), ("k3", 3, 1.76), ("no-draft", 0, no_draft_s)):
            seconds = {1: 2.2 if name == "no-draft" else 1.1, 4: at_four}
            (folder / f"{repeat}-{name}.json").write_text(json.dumps(make_run(k, seconds)))


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """All servers' files are there: none is started."""
    monkeypatch.setattr(bench.replay, "run_server", None)


@pytest.mark.usefixtures("no_server")
def test_the_command_writes_a_schedule_that_serve_command_takes(work: dict[str, Path], tmp_path: Path) -> None:
    write_steps(tmp_path)
    write_check(tmp_path, no_draft_s=1.1)
    result = run_schedule(work, tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "schedule.json").read_text())
    assert (report["num_speculative_tokens"], report["num_speculative_tokens_per_batch_size"]) == (3, SCHEDULE)
    assert report["step_ms"]["4"] == pytest.approx({"0": 200, "1": 400, "2": 600, "3": 800}, rel=1e-3)
    assert [at["concurrency"] for at in report["check"]] == [1, 4]
    assert any("Batch sizes above 4 were not measured" in warning for warning in report["warnings"])
    for page in ((tmp_path / "schedule.md").read_text(), result.stdout):
        assert "| 1 | 3 |\n| 2 | 1 |\n| 3 to 16 | 0 |" in page
        assert "| 4 | 20.0 | 16.7 | 12.5 | 20.0 | 1.00 | 1.200 [1.200, 1.200] | 1.000 [1.000, 1.000] |" in page
        assert f"      num_speculative_tokens_per_batch_size: {json.dumps(SCHEDULE)}" in page
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    sets = [f"serve.speculative.num_speculative_tokens_per_batch_size={json.dumps(SCHEDULE)}"]
    printed = run_here(
        "serve", "command", "--recipe", work["recipe"], "--draft", work["draft"], "--set", *sets, "--format", "json"
    )
    words = json.loads(printed.stdout)["command"]
    served = json.loads(words[words.index("--speculative-config") + 1])
    assert served["num_speculative_tokens_per_batch_size"] == SCHEDULE
    again = run_schedule(work, tmp_path, "--set", *sets)  # a recipe that has a schedule already measures anew
    assert again.returncode == 0, again.stderr


@pytest.mark.usefixtures("no_server")
def test_what_was_predicted_is_measured_before_it_is_chosen(
    work: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted at concurrency 4, ms of a token with K = 0, 1, 2, 3: 200, 250 / 1.667 = 150, 305 / 2.18 = 139.9, and
    360 / 2.5 = 144. Measured, K = 2 is slower than K = 3, so it is not chosen.
    """
    monkeypatch.setitem(ACCEPTED, 2, [2, 2, 1, 0, 0])
    found = {0: {1: 2.2, 4: 1.1}, 1: {1: 1.386, 4: 0.825}, 2: {1: 1.3, 4: 0.9}, 3: {1: 1.1, 4: 0.792}}
    (tmp_path / "steps").mkdir()
    for k, seconds in found.items():
        (tmp_path / f"steps/k{k}.json").write_text(json.dumps(make_run(k, seconds)))
    result = run_schedule(work, tmp_path, "--no-check")
    assert result.returncode == 0, result.stderr
    assert "bench: measures K = 2, too" in result.stderr
    report = json.loads((tmp_path / "schedule.json").read_text())
    assert report["measured"] == [0, 1, 2, 3]
    assert report["num_speculative_tokens_per_batch_size"] == [[1, 16, 3]]


@pytest.mark.usefixtures("no_server")
def test_the_command_fails_where_no_draft_is_faster(work: dict[str, Path], tmp_path: Path) -> None:
    write_steps(tmp_path)
    write_check(tmp_path, no_draft_s=1.0)
    result = run_schedule(work, tmp_path)
    assert result.returncode == 1
    assert "0.909 [0.909, 0.909] of the speed with no draft at concurrency 4 (-9.1%)" in result.stderr
    assert json.loads((tmp_path / "run.json").read_text())["summary"] == {"schedule": SCHEDULE, "passed": False}
    assert run_schedule(work, tmp_path, "--no-check").returncode == 0  # the schedule alone
    assert json.loads((tmp_path / "schedule.json").read_text())["check"] == []


@pytest.mark.usefixtures("no_server")
def test_a_draft_that_never_pays_gets_no_schedule_to_serve(work: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    for k in ACCEPTED:
        (tmp_path / f"steps/k{k}.json").write_text(json.dumps(make_run(k, {1: 2.2 + k, 4: 1.1 + k})))
    result = run_schedule(work, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "No number of draft tokens is faster than none: serve the target without this draft." in result.stdout
    assert "num_speculative_tokens" not in result.stdout
    assert json.loads((tmp_path / "schedule.json").read_text())["check"] == []


@pytest.mark.usefixtures("no_server")
def test_a_server_that_ignores_its_schedule_is_an_error(work: dict[str, Path], tmp_path: Path) -> None:
    write_steps(tmp_path, k1=3.0)
    result = run_schedule(work, tmp_path)
    assert result.returncode == 1
    assert "steps/k1.json, concurrency 1: found 3.00 draft tokens a step in vLLM's metrics, expected 1" in result.stderr


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "serve.args.data-parallel-size=2"], "vLLM says 'Dynamic speculative decoding is not supported with"),
        (["--set", "serve.speculative.parallel_drafting=true"], "parallel drafting for EAGLE speculative decoding"),
        (["--set", "serve.speculative.enable_adaptive_verification=true"], "it chooses how many draft tokens"),
        (["--draft-tokens", "1-7"], "found [1, 2, 3, 4, 5, 6, 7], expected from 1 to 3"),
        (["--concurrency", "1,32"], "found 32, expected at most max-num-seqs, 16"),
        (["--concurrency", "1,12"], "found 9 replies for 12 requests in flight"),
        (["--concurrency", "0,4"], "--concurrency: found 0,4, expected at least 1"),
    ],
)
def test_what_cannot_have_a_schedule_is_refused_before_a_server_starts(
    work: dict[str, Path], tmp_path: Path, more: list[str], message: str
) -> None:
    result = run_schedule(work, tmp_path, *more)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run.json").exists()


def test_with_given_rates_servers_accept_by_them_and_replies_keep_their_length(
    work: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, Replay] = {}

    def note(replay: Replay, _draft: Path, path: Path) -> dict[str, Any]:
        served[path.stem] = replay
        k = int(path.stem[1:])
        return make_run(k, SECONDS[k])

    monkeypatch.setattr(bench.schedule, "serve_and_send", note)
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(json.dumps({"per_position": [0.7, 0.5, 0.3]}))
    recipe = load_recipe(work["recipe"])
    asked = Asked(recipe, work["draft"], work["conversations"], tmp_path, [1, 3], evaluation)
    replay: Any = Replay(recipe, asked.target, [Turn("a-0-1", "", "", [1], [5, 6, 7])], None)  # type: ignore[arg-type]
    for is_cpu in (False, True):
        monkeypatch.setattr(bench.schedule, "is_cpu_engine", lambda is_cpu=is_cpu: is_cpu)
        measure_steps(asked, replay, asked.numbers)
        assert list(served) == ["k3", "k1", "k0"]
        for k in (0, 1, 3):
            found = served[f"k{k}"]
            speculative = dict(found.recipe.serve.speculative)
            assert speculative.pop("num_speculative_tokens_per_batch_size") == [[1, 16, k]]
            assert speculative.pop("num_speculative_tokens") == 3
            rates = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.7, 0.5, 0.3]}
            assert speculative == ({} if is_cpu else rates)
            (turn,) = found.turns
            assert (turn.max_tokens, turn.sampling) == ((None, {}) if is_cpu else (3, {"ignore_eos": True}))


def test_concurrencies_are_numbers_separated_by_commas() -> None:
    assert parse_concurrency("8,1,2,2") == [1, 2, 8]
    assert parse_concurrency(None) is None
    with pytest.raises(UserError, match=r"--concurrency: found 1;2, expected numbers as in 1,2,4,8"):
        parse_concurrency("1;2")


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_drafts_by_batch_size_as_the_schedule_says_and_replies_stay_the_same(
    pipeline: Path, tmp_path: Path
) -> None:
    """Three draft tokens alone, one in pairs, none in larger batches."""
    schedule = "num_speculative_tokens_per_batch_size: [[1, 1, 3], [2, 2, 1], [3, 32, 0]]"
    sets = [f"target.path={pipeline}/target", f"serve.speculative={{num_speculative_tokens: 3, {schedule}}}"]
    recipe = load_recipe(RECIPE, sets)
    run = Run.open(tmp_path / "run", "test", settings={}, inputs={}, recipe_yaml="")
    turns = read_turns(read_conversations(pipeline / "synth/held_out"))[:8]
    replay = Replay(recipe, Target.here(recipe.target), turns, run)
    served = serve_and_send(replay, pipeline / "export", tmp_path / "served.json", concurrency=[1, 2, 8])
    alone, pairs, many = (served["points"][key] for key in ("1", "2", "8"))
    assert drafted_per_step(alone) == pytest.approx(3, abs=0.1)
    assert 1 <= drafted_per_step(pairs) < 1.8  # the last reply runs alone
    assert many["counters"]["num_drafts"] < 0.5 * alone["counters"]["num_drafts"]
    replies = {turn.id: turn.reply for turn in turns}
    for point in (alone, pairs, many):
        assert {answer["id"]: answer["token_ids"] for answer in point["answers"]} == replies

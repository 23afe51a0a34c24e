"""Claims about comparing accuracies: what is beyond chance, what is asked, what is scored, what is refused.

That a real draft changes nothing, and that a lossy one is found, is test_pipeline's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted
from accuracy_task import write_task
from conftest import ROOT, run_here

from bench.accuracy import Evaluation
from bench.accuracy_report import Answers, judge, largest_by_chance, summarize
from bench.plan import evaluated_points
from bench.questions import Asking, ask_questions, find_answer, load_task, open_tasks
from bench.requests import Served
from common.errors import IncompleteError, UserError
from contracts.accuracy import Scores, explain_scores
from recipe.bench import AccuracySection
from recipe.load import load_recipe

M3 = ROOT / "recipes/MiniMax-M3-DFlash/eagle3.yaml"
TAGS = ("<mm:think>", "</mm:think>")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are converted here, not in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_answers(base: list[list[float]], draft: list[list[float]], kind: str = "greedy", prompt: str = "") -> Answers:
    """Passes of one task: a list of scores per pass."""

    def to_pass(scores: list[float], prompt: str, counts: int) -> dict[str, Any]:
        questions = [
            {
                "id": n,
                "prompt": f"{prompt}{n}",
                "replies": [f"{score:g}"],
                "cut": 0,
                "metrics": {"acc,none": score, "bleu,none": None},
            }
            for n, score in enumerate(scores)
        ]
        return {"tasks": {"sums": questions}, "counters": {"num_drafts": counts, "num_accepted_tokens": 2 * counts}}

    return Answers("recipe-c8", kind, [to_pass(s, "", 0) for s in base], [to_pass(s, prompt, 5) for s in draft])


def explain(report: dict[str, Any]) -> str:
    """What the card says of a report."""
    return explain_scores(Scores(lm_eval="0.4.9", thinking_mode="", sampling={}, **report))


@pytest.mark.parametrize(("num_worse", "is_found"), [(7, False), (8, True), (20, True)])
def test_greedy_answers_that_all_get_worse_are_found_from_eight_on(num_worse: int, is_found: bool) -> None:
    scores = [1.0] * 30
    worse = [0.0] * num_worse + scores[num_worse:]
    report = summarize([make_answers([scores], [worse])], 0.99)
    (row,) = report["rows"]
    assert (row["base"], row["draft"], row["questions"]) == (1.0, pytest.approx(1 - num_worse / 30), 30)
    assert row["is_beyond_chance"] == is_found
    assert report["replies"][0]["identical"] == 30 - num_worse
    assert report["replies"][0]["acceptance_length"] == 3.0
    if not is_found:
        judge(report)
        assert explain(report).startswith("None of 1 differences is larger than chance explains (99% for")
        return
    assert explain(report).startswith("**The draft changes the target's answers:** 1 of 1 differences is larger than")
    with pytest.raises(IncompleteError) as error:
        judge(report)
    assert "recipe-c8, task sums, acc,none, greedy answers: found " in str(error.value)
    assert f"a difference of {-num_worse / 30:+.4f} over 30 questions, expected at most 0." in str(error.value)
    assert "**too large**" in explain(report)


def test_identical_answers_pass_and_as_many_better_as_worse_ones_do() -> None:
    scores = [1.0, 0.0] * 50
    report = summarize([make_answers([scores], [scores]), make_answers([scores], [scores[::-1]])], 0.99)
    same, turned = report["rows"]
    assert (same["difference"], same["by_chance"], same["standard_error"]) == (0.0, 0.0, 0.0)
    assert turned["difference"] == 0.0
    assert turned["by_chance"] > 0.2
    judge(report)


@pytest.mark.parametrize("num_questions", [12, 60])
def test_samples_of_one_target_are_told_apart_as_seldom_as_stated(num_questions: int) -> None:
    draw = np.random.default_rng(5)
    ability = draw.beta(0.5, 0.5, num_questions)  # questions are easy or hard, and the sides share them
    wrong = 0
    for _ in range(150):
        base, draft = (draw.binomial(4, ability) / 4 for _ in range(2))
        differences = draft - base
        wrong += abs(differences.mean()) > largest_by_chance(differences, 0.1) + 1e-9
    assert wrong / 150 < 0.1 + 2 * 0.0245  # two standard errors of a share of 0.1


def test_a_loss_that_sampling_hides_in_one_pass_is_found_by_the_mean_of_several() -> None:
    draw = np.random.default_rng(7)
    ability = draw.beta(0.5, 0.5, 200)
    draw_passes = lambda ability: [draw.binomial(1, ability).astype(float).tolist() for _ in range(8)]  # noqa: E731
    base, draft = draw_passes(ability), draw_passes(0.92 * ability)
    assert summarize([make_answers(base, draft, "sampled")], 0.99)["rows"][0]["is_beyond_chance"]
    assert not summarize([make_answers(base[:1], draft[:1], "sampled")], 0.99)["rows"][0]["is_beyond_chance"]


def test_too_few_questions_to_find_any_difference_fail() -> None:
    report = summarize([make_answers([[1.0] * 7], [[1.0] * 7])], 0.99)
    with pytest.raises(IncompleteError, match="task sums: found 7 questions, expected at least 8"):
        judge(report)
    assert "**Not conclusive** for sums: with fewer than 8 questions no difference can be." in explain(report)


def test_a_task_without_a_number_for_each_question_fails() -> None:
    report = {**summarize([make_answers([[1.0] * 9], [[1.0] * 9])], 0.99), "rows": []}
    with pytest.raises(IncompleteError, match="found no metric with a number for each question"):
        judge(report)
    assert "**Not conclusive**: no metric" in explain(report)


def test_sides_that_were_asked_other_questions_are_not_compared() -> None:
    with pytest.raises(UserError, match="task sums: found other questions with the draft than without"):
        summarize([make_answers([[1.0]], [[1.0]], prompt="other")], 0.99)


def test_a_server_that_does_not_draft_is_not_compared() -> None:
    idle = make_answers([[1.0]], [[1.0]])
    idle.draft[0]["counters"].update(num_drafts=0)
    with pytest.raises(IncompleteError, match="found no drafted token"):
        summarize([idle], 0.99)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("4\n\nQ: more", "4"),
        ("<mm:think>Q: is it\n\n5?</mm:think>\n\n4", "4"),
        ("it is\n\n5?</mm:think>4\n\n", "4"),  # the prompt opened the thoughts
        ("<mm:think>it is 4", ""),  # cut
    ],
)
def test_what_is_scored_follows_the_thoughts_and_ends_at_the_tasks_stop_string(reply: str, answer: str) -> None:
    assert find_answer(reply, TAGS, ["\n\n", ""]) == answer


def test_all_of_a_reply_is_scored_if_the_target_has_no_thinking_tags() -> None:
    assert find_answer("<b>4</b>\n\nQ: more", None, ["\n\n"]) == "<b>4</b>"


def ask(folder: Path, server: scripted.Server, **changes: Any) -> dict[str, Any]:
    """The questions of folder's task `echo`, asked of a scripted server."""
    section = AccuracySection(tasks=["echo"], include_path=folder, **changes)
    asking = Asking({"max_tokens": 9, "temperature": 0.5}, "0/sampled1", TAGS, 4, "echo")
    loaded = load_task(open_tasks(section), "echo", section)
    return ask_questions(loaded, Served(server.url.removesuffix("/v1"), "m"), asking, section.limit)


def test_every_question_is_asked_with_its_own_seed_and_scored_by_lm_eval(tmp_path: Path) -> None:
    rows = [{"system": "Be brief.", "question": f"item {n}", "answer": f"reply to item {n % 3}"} for n in range(6)]
    rows[5]["question"] = "item 5, endless"
    folder = write_task(tmp_path / "tasks", "echo", rows, until=[", "])
    with scripted.serve() as server:
        first = ask(folder, server)
        again = ask(folder, server)
        bodies = server.requests
    assert first == again
    (questions,) = first.values()
    assert [question["metrics"]["exact_match,none"] for question in questions] == [1, 1, 1, 0, 0, 0]
    assert [question["replies"][0] for question in questions][-2:] == ["reply to item 4", "reply to item 5, endless"]
    assert [question["cut"] for question in questions] == [0, 0, 0, 0, 0, 1]
    seeds = {body["messages"][-1]["content"]: body["seed"] for body in bodies}
    assert len(bodies) == 12
    assert len(set(seeds.values())) == 6
    assert all(body["seed"] == seeds[body["messages"][-1]["content"]] for body in bodies)
    assert all((body["max_tokens"], body["temperature"]) == (9, 0.5) for body in bodies)
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not any("stop" in body for body in bodies)


def test_examples_are_turns_of_their_own_and_the_same_every_time(tmp_path: Path) -> None:
    rows = [{"system": "Be brief.", "question": f"item {n}", "answer": f"answer {n}"} for n in range(9)]
    folder = write_task(tmp_path / "tasks", "echo", rows)
    with scripted.serve() as server:
        first = ask(folder, server, num_fewshot=2, limit=3)
        again = ask(folder, server, num_fewshot=2, limit=3)
        bodies = server.requests
    assert first == again
    assert len(first["echo"]) == 3
    assert all(
        [m["role"] for m in body["messages"]] == ["system", *["user", "assistant"] * 2, "user"] for body in bodies
    )


def test_a_question_without_an_answer_is_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "echo", [{"system": "x", "question": "fail 400", "answer": ""}])
    with (
        scripted.serve() as server,
        pytest.raises(IncompleteError, match=r"\(echo, question 0\): found HTTP 400: scripted refusal"),
    ):
        ask(folder, server)


def test_tasks_that_cannot_be_asked_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "echo", [{"system": "x", "question": "y", "answer": "z"}])
    text = (folder / "echo.yaml").read_text()
    choice = text.replace("generate_until", "multiple_choice").replace("exact_match", "acc")
    (folder / "choice.yaml").write_text(choice.replace("task: echo", "task: choice") + "doc_to_choice: [a, b]\n")
    (folder / "absent.yaml").write_text(text.replace("task: echo", "task: absent").replace("echo.jsonl", "none.jsonl"))
    section = AccuracySection(tasks=["choice", "absent"], include_path=folder)
    manager = open_tasks(section)
    with pytest.raises(UserError, match=r"task choice: found multiple_choice .* expected text answers"):
        load_task(manager, "choice", section)
    with pytest.raises(UserError, match=r"task absent: found no data set \(FileNotFoundError: "):
        load_task(manager, "absent", section)
    with pytest.raises(UserError, match=r"found ecko, expected a task of lm-eval .*Did you mean 'echo'\?"):
        open_tasks(section.model_copy(update={"tasks": ["ecko"]}))
    with pytest.raises(UserError, match="found no folder"):
        open_tasks(section.model_copy(update={"include_path": tmp_path / "none"}))


def test_a_missing_lm_eval_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    args = ["bench", "accuracy", "-r", M3, "--draft", tmp_path, "--output", tmp_path / "out"]
    refused = run_here(*args, check=False)
    assert refused.returncode == 2
    assert "found no lm-eval in this environment, expected the extra `accuracy`." in refused.stderr


def test_the_evaluated_points_of_the_plan_are_the_loads() -> None:
    recipe = load_recipe(M3)
    work = Evaluation(recipe, Path("draft"), Path("out"), evaluated_points(recipe))
    assert {(load.name, load.concurrency) for load in work.loads} == {
        ("8k1k-tp8-c64", 64), ("8k1k-tp8-ep8-c64", 64), ("8k1k-tp4-c64", 64), ("8k1k-tp8-ep8-c256", 256),
        ("8k1k-tp8-ep8-dp-c256", 256),
    }  # fmt: skip
    assert {load.flags.get("data-parallel-size") for load in work.loads if load.server.endswith("dp")} == {8}
    assert [load.name for load in Evaluation(recipe, Path("draft"), Path("out")).loads] == ["recipe-c64"]
    assert [p.id for p in evaluated_points(recipe, layouts=["tp8"], concurrencies=[64])] == ["8k1k-tp8-c64"]
    with pytest.raises(UserError, match="no point that is evaluated"):
        evaluated_points(recipe, concurrencies=[32])

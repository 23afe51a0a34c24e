"""Claims about overlap: which training rows overlap with an evaluation question, and which do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.minhash import sketch
from contracts.evaluation_sets import find_rows, open_evaluation_set
from contracts.overlap import Match, OverlapIndex, Question, read_document, read_question, read_questions

LONG = "A baker sells forty loaves each morning and half as many each afternoon how many does he sell in a week"
JOINED = "Please: " + " ".join(f"{a}{b} {c}" for a, b, c in zip(*[iter(LONG.split())] * 3, strict=True))
SHORT = "Write a poem about rain"
NINE = "Explain why the sky looks blue to human eyes"


def ask(*turns: str, index: int = 0) -> Question:
    question = read_question({"id": f"q{index}", "turns": list(turns)}, "set", index)
    assert question is not None
    return question


def find(index: OverlapIndex, *texts: str, reply: str = "") -> list[Match]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": text} for text in texts]
    document = read_document([*messages, {"role": "assistant", "content": reply}], with_replies=True)
    return index.find([document], sketch([document.said]))[0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (LONG, "equal"),
        (LONG.upper().replace(" ", ",  "), "equal"),
        (LONG.replace("each morning", "eachmorning").replace(" ", "\n"), "equal"),
        (f"Please solve this for me: {LONG}? Thanks!", "ngram"),
        ("x " + " ".join(LONG.split()[4:17]) + " y", "ngram"),
        (JOINED, "near"),
    ],
)
def test_a_question_is_found_in_what_it_is_paraphrased_to(text: str, kind: str) -> None:
    (match,) = find(OverlapIndex([ask(LONG)]), text)
    assert (match.kind, match.dataset, match.id) == (kind, "set", "q0")
    assert (match.similarity is not None) == (kind == "near")


def test_twelve_words_in_common_are_no_overlap_and_the_length_can_be_chosen() -> None:
    twelve = "x " + " ".join(LONG.split()[4:16]) + " y"
    assert find(OverlapIndex([ask(LONG)]), twelve) == []
    assert find(OverlapIndex([ask(LONG)], ngram=12), twelve)[0].text == " ".join(LONG.lower().split()[4:16])
    assert find(OverlapIndex([ask(LONG)], near=None), JOINED) == []


def test_a_shorter_question_must_occur_as_a_whole_and_the_shortest_be_the_message() -> None:
    index = OverlapIndex([ask(NINE), ask(SHORT, index=1)])
    assert [match.kind for match in find(index, f"Now {NINE}, please.")] == ["ngram"]
    assert find(index, "Explain why the sky looks blue to cats and to their many enemies") == []
    assert [match.id for match in find(index, "hello", "write a POEM about rain!")] == ["q1"]
    assert find(index, f"{SHORT} and snow, and sun, and the four winds over the seven seas of the old world") == []


def test_later_turns_count_unless_they_are_short() -> None:
    index = OverlapIndex([ask(LONG, "Explain more.", NINE)])
    assert [match.kind for match in find(index, NINE)] == ["equal"]
    assert find(index, "Explain more.") == []


def test_a_run_of_words_that_many_questions_share_is_boilerplate() -> None:
    same = "give the answer as a number without units and explain each step of the way"
    some = [ask(f"{' '.join(f'w{n}x{k}' for k in range(14))} {same}", index=n) for n in range(11)]
    text = f"What is three times seven? {same}"
    assert find(OverlapIndex(some, near=None), text) == []
    assert len(find(OverlapIndex(some[:10], near=None), text)) == 10
    # The same question eleven times is one question.
    assert len(find(OverlapIndex([ask(LONG, index=n) for n in range(11)], near=None), f"Hm. {LONG}")) == 11


def test_a_reply_that_quotes_a_question_is_found_and_marked() -> None:
    index = OverlapIndex([ask(LONG)])
    (match,) = find(index, "Give me an exercise.", reply=f"Here is one: {LONG}.")
    assert match.in_reply
    assert find(index, "Give me an exercise.", reply="No.") == []


def test_questions_in_scripts_without_spaces_are_compared_by_character() -> None:
    question = "小明有三个苹果，他又买了五个苹果，请问他现在一共有多少个苹果？"
    (match,) = find(
        OverlapIndex([ask(question)]), f"你好！{question.replace('，', ' ')}谢谢，请一步一步地解释你的答案并检查结果"
    )
    assert match.kind == "ngram"


def test_a_set_gives_its_questions_and_counts_the_rows_without_one(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(
        "\n".join(map(json.dumps, [{"question": LONG, "answer": "4"}, {"question": "?"}, {"turns": [SHORT]}]))
    )
    found = list(read_questions(open_evaluation_set(f"gsm8k={file}")))
    assert [question and len(question.turns) for question in found] == [1, None, 1]


def test_a_folder_of_a_run_stands_for_its_rows_once_it_is_finished(tmp_path: Path) -> None:
    state = {"stage": "synth generate", "settings": {}, "inputs": {}, "seconds": 0, "complete": True}
    (tmp_path / "run.json").write_text(json.dumps(state))
    assert find_rows(tmp_path).name == "conversations.jsonl"
    (tmp_path / "run.json").write_text(json.dumps({**state, "complete": False}))
    with pytest.raises(UserError, match="synth merge"):
        find_rows(tmp_path)

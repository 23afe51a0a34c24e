"""Claims about `synth prepare`: planted duplicates and questions are found, counts reconcile, output is stable."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import kill_when, read_lines, run_here

from common.files import hash_file
from contracts.evaluation_sets import SOURCES
from contracts.prompt_files import Row, open_prompts
from contracts.prompts import read_prompt_row
from recipe.load import load_recipe
from recipe.prepare import PrepareSection, SourceSection
from synth.language import detect_language
from synth.prepare_pool import Pool, share_out
from synth.prepare_sources import Source, read_row
from synth.presets import PRESETS, list_presets
from synth.prompt_length import PromptLength
from synth.prompts import Prompt, read_prompts

WORDS = [
    "river",
    "stone",
    "garden",
    "window",
    "letter",
    "morning",
    "winter",
    "table",
    "paper",
    "silver",
    "engine",
    "market",
    "bridge",
    "forest",
    "island",
    "captain",
    "number",
    "circle",
    "answer",
    "method",
    "reason",
    "story",
    "train",
    "music",
    "colour",
    "shadow",
    "doctor",
    "village",
    "teacher",
    "kitchen",
    "summer",
    "signal",
]
STEPS = ["unusable", "length", "overlap", "duplicate", "near_duplicate", "category", "language", "share", "kept"]


def make_text(rng: random.Random, num_words: int = 40) -> str:
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(30)}" for _ in range(num_words))


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, prepare: dict[str, Any], target: str = "nowhere") -> Path:
    path = folder / "recipe.yaml"
    values = {
        "target": {"path": target, "max_model_len": 256, "num_aux_layers": 2},
        "prepare": {"against": [], **prepare},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def prepare(recipe: Path, output: Path, *more: object) -> dict[str, Any]:
    run_here("synth", "prepare", "-r", recipe, "-o", output, *more)
    return dict(json.loads((output / "manifest.json").read_text()))


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """Three sources in three forms, an evaluation set and a held-out file; the step that each planted row ends at."""
    import datasets

    rng = random.Random(0)
    plain = [make_text(rng) for _ in range(90)]
    questions = [make_text(rng, 20) for _ in range(6)] + ["Who wrote the old song"]
    held_out = [make_text(rng, 30) for _ in range(2)]
    steps = {}

    def plant(name: str, id_: str, step: str, text: str) -> dict[str, Any]:
        steps[f"{name}/{id_}"] = step
        return {"id": id_, "text": text}

    a = [{"id": f"a{n}", "text": text} for n, text in enumerate(plain[:30])]
    a += [
        plant("a", "same", "duplicate", plain[0]),
        plant("a", "case", "duplicate", plain[1].upper()),
        plant("a", "question-case", "overlap", questions[0].swapcase()),
        plant("a", "question-in-text", "overlap", f"Hello! Can you help me? {questions[1]}. Thank you."),
    ]
    b = [{"id": f"b{n}", "text": text} for n, text in enumerate(plain[30:60])]
    b += [
        plant("b", "other-set", "duplicate", plain[2].replace(" ", " \n ")),
        plant("b", "punctuation", "duplicate", f"«{plain[3].replace(' ', ', ')}»!"),
        plant("b", "one-word", "near_duplicate", plain[4].replace(plain[4].split()[20], "changed")),
        plant("b", "question-spacing", "overlap", questions[2].replace(" ", "\t  ")),
        plant("b", "question-punctuation", "overlap", "; ".join(questions[3].split())),
        plant("b", "question-short", "overlap", "WHO WROTE -- the old song?!"),
        plant("b", "held-out", "overlap", held_out[0].title()),
    ]
    c = [{"id": f"c{n}", "text": text} for n, text in enumerate(plain[60:])]
    c += [
        plant("c", "of-a-duplicate", "duplicate", plain[1].lower()),
        plant("c", "added-word", "near_duplicate", f"Please: {plain[65]}"),
        plant(
            "c", "question-unicode", "overlap", "".join(chr(ord(x) + 0xFEE0) if x > " " else x for x in questions[4])
        ),
        plant("c", "question-changed", "overlap", questions[5].replace(questions[5].split()[9], "w")),
        plant("c", "picture", "unusable", ""),
    ]
    for rows in (a, b, c):
        rng.shuffle(rows)
        # Where the first of two equal rows stays, planted ones come last.
        rows.sort(key=lambda row: row["id"][1:].isdigit(), reverse=True)
    write_rows(tmp_path / "a.jsonl", [{"id": row["id"], "prompt": row["text"], "category": "x"} for row in a])
    turns = [[{"from": "human", "value": row["text"]}, {"from": "gpt", "value": "A long reply."}] for row in b]
    (tmp_path / "b.json").write_text(
        json.dumps([{"id": row["id"], "conversations": turn} for row, turn in zip(b, turns, strict=True)])
    )
    columns = {"key": [row["id"] for row in c], "question": [row["text"] or None for row in c]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "c")
    write_rows(tmp_path / "gsm8k.jsonl", [{"question": question} for question in questions])
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": text} for text in held_out])
    return steps


def planted_recipe(folder: Path, **more: Any) -> Path:
    sources = [
        {"path": f"{folder}/a.jsonl", "license": "mit"},
        {"path": f"{folder}/b.json"},
        {"path": f"{folder}/c", "columns": {"id": "key", "prompt": "question"}, "category": "y"},
    ]
    return write_recipe(folder, {"sources": sources, **more})


def test_all_planted_duplicates_and_questions_are_removed_nothing_else_and_counts_reconcile(
    planted: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sets = ["--against", f"gsm8k={tmp_path}/gsm8k.jsonl", "--against", tmp_path / "held_out.jsonl"]
    manifest = prepare(planted_recipe(tmp_path), output, *sets)
    removed = read_lines(output / "removed.jsonl")
    found = {f"{row['source']}/{row['id'].removeprefix(row['source'] + '/')}": row for row in removed}
    assert {id_: row["step"] for id_, row in found.items()} == planted
    assert {row["match"]["dataset"] for row in removed if row["step"] == "overlap"} == {"gsm8k", "held_out"}
    assert all(row["reason"] and row["match"] for row in removed if row["step"] != "unusable")
    rows = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {f"{s}/{s}{n}" for s in "abc" for n in range(30)}
    assert Counter(row["category"] for row in rows) == {"x": 30, "b": 30, "y": 30}
    assert "A long reply" not in (output / "prompts.jsonl").read_text()
    for source in manifest["sources"]:
        counts = source["counts"]
        assert counts["input"] == source["rows"] == sum(counts[step] for step in STEPS)
        of_source = [row["step"] for row in removed if row["source"] == source["name"]]
        assert {step: counts[step] for step in STEPS if step != "kept" and counts[step]} == Counter(of_source)
        assert counts["kept"] == 30
    assert manifest["output"]["rows"] + manifest["removed"]["rows"] == 106
    assert manifest["output"]["sha256"] == hash_file(output / "prompts.jsonl")
    assert manifest["removed"]["sha256"] == hash_file(output / "removed.jsonl")
    assert manifest["sources"][0]["license"] == "mit"
    assert [found["questions"] for found in manifest["evaluation_sets"]] == [7, 2]
    assert "mt_bench" in manifest["unchecked_sets"]
    assert not (output / "work").exists()


def test_synth_generate_reads_every_prepared_row(planted: dict[str, str], tmp_path: Path) -> None:
    prepare(planted_recipe(tmp_path), tmp_path / "out")
    rows = open_prompts(tmp_path / "out/prompts.jsonl").rows()

    class Unseen:
        def first_row(self, kind: str, key: str, row: int) -> int:
            return row

    prompts = list(read_prompts(rows, [], [0.0], 1, Unseen()))
    assert all(isinstance(prompt, Prompt) and prompt.source_id[:2] in ("a/", "b/", "c/") for prompt in prompts)


def test_the_output_depends_on_rows_recipe_and_seed_alone(planted: dict[str, str], tmp_path: Path) -> None:
    first = prepare(planted_recipe(tmp_path, num_rows=40), tmp_path / "one")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.jsonl", "b.json", "c"):
        (tmp_path / name).rename(moved / name)
    again = prepare(planted_recipe(moved, num_rows=40), tmp_path / "two")
    other = prepare(planted_recipe(moved, num_rows=40, seed=1), tmp_path / "three")
    assert first["output"] == again["output"]
    assert first["output"]["rows"] == other["output"]["rows"] == 40
    assert first["output"]["sha256"] != other["output"]["sha256"]


def test_a_killed_run_goes_on_after_its_last_finished_source_and_a_finished_one_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def when(output: Path) -> int:
        return (output / "work/000/rows.bin").stat().st_mtime_ns

    enter = Pool.__enter__
    rng = random.Random(0)
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": make_text(rng, 60)} for _ in range(4000)])
    recipe = write_recipe(tmp_path, {"sources": [{"path": f"{tmp_path}/{name}.jsonl"} for name in "ab"]})
    output = tmp_path / "out"
    args = ("synth", "prepare", "-r", recipe, "-o", output)
    assert kill_when((output / "work/000").exists, *args) == -9
    assert not (output / "prompts.jsonl").exists()
    scanned = when(output)
    write_rows(tmp_path / "c.jsonl", [{"prompt": "x"}])
    refused = run_here(*args, "--set", f"prepare.sources=[{{path: {tmp_path}/c.jsonl}}]", check=False)
    assert refused.returncode == 2
    seen = []
    with monkeypatch.context() as patch:
        # The scans are gone at the end: look at the first one when the pool opens it.
        patch.setattr(Pool, "__enter__", lambda pool: seen.append(when(output)) or enter(pool))
        run_here(*args)
    assert seen == [scanned]
    clean = prepare(recipe, tmp_path / "clean")
    assert clean["output"]["sha256"] == hash_file(output / "prompts.jsonl")
    assert "is finished, skipped" in run_here(*args).stdout


def test_caps_and_weights_draw_rows_of_each_category_and_source(tmp_path: Path) -> None:
    rng = random.Random(0)
    one = [{"prompt": make_text(rng), "category": "abc"[n % 3]} for n in range(120)]
    write_rows(tmp_path / "one.jsonl", one)
    write_rows(tmp_path / "two.jsonl", [{"prompt": make_text(rng)} for _ in range(60)])
    write_rows(tmp_path / "few.jsonl", [{"prompt": make_text(rng)} for _ in range(5)])
    sources = [
        {"path": f"{tmp_path}/one.jsonl", "weight": 3},
        {"path": f"{tmp_path}/two.jsonl"},
        {"path": f"{tmp_path}/few.jsonl", "weight": 10, "max_rows": 4},
    ]
    caps = {"a": 10, "*": 30, "two": 1000}
    recipe = write_recipe(tmp_path, {"sources": sources, "num_rows": 84, "max_per_category": caps})
    manifest = prepare(recipe, tmp_path / "out")
    counts = {source["name"]: source["counts"] for source in manifest["sources"]}
    assert (counts["one"]["category"], counts["two"]["category"]) == (50, 0)
    assert {name: of["kept"] for name, of in counts.items()} == {"one": 60, "two": 20, "few": 4}
    assert manifest["output"]["categories"]["a"] <= 10
    reasons = Counter(row["reason"] for row in read_lines(tmp_path / "out/removed.jsonl"))
    caps = {"beyond the cap of a": 30, "beyond the cap of b": 10, "beyond the cap of c": 10}
    assert reasons == {
        **caps,
        "beyond the share of one": 10,
        "beyond the share of two": 40,
        "beyond the share of few": 1,
    }


@pytest.mark.parametrize(
    ("total", "weights", "available", "expected"),
    [
        (None, [1, 1], [3, 4], [3, 4]),
        (100, [1, 1], [3, 4], [3, 4]),
        (10, [1, 1], [100, 100], [5, 5]),
        (10, [1, 2], [100, 100], [3, 7]),
        (10, [1, 1, 1], [1, 100, 100], [1, 5, 4]),
        (10, [1, 5, 4], [100, 0, 2], [8, 0, 2]),
    ],
)
def test_shares_follow_the_weights_and_what_a_source_lacks_the_others_give(
    total: int | None, weights: list[float], available: list[int], expected: list[int]
) -> None:
    assert share_out(total, weights, available) == expected


def test_languages_are_capped_and_short_texts_are_not_guessed(tmp_path: Path) -> None:
    german = ["Schreibe ein langes Gedicht über den Herbst im Wald", "Erkläre mir bitte die Geschichte der Stadt Köln"]
    english = ["Please write a long poem about autumn in the forest", "Explain the history of the city of London to me"]
    write_rows(tmp_path / "a.jsonl", [{"prompt": text} for text in [*german, *english, "Hi"]])
    recipe = write_recipe(
        tmp_path, {"sources": [{"path": f"{tmp_path}/a.jsonl"}], "max_per_language": {"de": 1, "fr": 0}}
    )
    manifest = prepare(recipe, tmp_path / "out")
    assert manifest["output"]["languages"] == {"de": 1, "en": 2, "und": 1}
    assert manifest["sources"][0]["counts"]["language"] == 1
    assert detect_language("请解释一下量子力学的基本原理") == "zh"


def test_rows_with_other_system_messages_tools_or_numbers_are_no_duplicates(tmp_path: Path) -> None:
    text = make_text(random.Random(0), 100)
    user = {"role": "user", "content": text}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [
        {"messages": [user]},
        {"messages": [{"role": "system", "content": "You are a pirate."}, user]},
        {"messages": [user], "tools": [tool]},
        {"prompt": "What is 3 + 4?"},
        {"prompt": "What is 3 - 4?"},
        {"prompt": "😀"},
        {"prompt": "🎉"},
        {"prompt": "???"},
        {"prompt": "!!!"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    recipe = write_recipe(tmp_path, {"sources": [{"path": f"{tmp_path}/a.jsonl"}]})
    assert prepare(recipe, tmp_path / "out")["output"]["rows"] == len(rows)


def test_lengths_are_those_of_the_rendered_prompt_though_few_are_tokenized(target_folder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [make_text(rng, rng.randint(1, 40)) for _ in range(60)]
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": t}]} for t in texts]
    rows += [{"turns": [text, text[:50]]} for text in texts[:5]]
    recipe = load_recipe(write_recipe(tmp_path, {"sources": [{"path": "x"}]}, str(target_folder)))
    found = [read_row(Row(n, "", row)) for n, row in enumerate(rows)]
    exact = PromptLength(recipe, 10**6, None)
    lengths = [int(exact.refuse(row).split()[0]) for row in found]
    assert min(lengths) < 60 < max(lengths)
    limited = PromptLength(recipe, 30, 90)
    assert [bool(limited.refuse(row)) for row in found] == [not 30 <= length <= 90 for length in lengths]
    write_rows(tmp_path / "a.jsonl", rows)
    section = {"sources": [{"path": f"{tmp_path}/a.jsonl"}], "max_tokens": 90, "near_duplicates": None}
    manifest = prepare(write_recipe(tmp_path, section, str(target_folder)), tmp_path / "out")
    assert manifest["sources"][0]["counts"]["length"] == sum(length > 90 for length in lengths)


ROWS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "ultrachat": ({"prompt": "a", "prompt_id": "i", "messages": [{"role": "user", "content": "a"}]}, "a", "i", ""),
    "sharegpt": ({"id": "i", "conversations": [{"from": "human", "value": "a"}]}, "a", "i", ""),
    "magpie": ({"uuid": "i", "instruction": "a", "response": "b", "task_category": "Math"}, "a", "i", "Math"),
    "opencodeinstruct": ({"id": "i", "input": "a", "output": "b", "domain": "generic"}, "a", "i", "generic"),
    "open-perfectblend": ({"conversations": [{"from": "human", "value": "a"}], "source": "s"}, "a", "", "s"),
    "nemotron": ({"uuid": "i", "category": "chat", "messages": [{"role": "user", "content": "a"}]}, "a", "i", "chat"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_columns_of_each_preset_become_prompt_rows(name: str, tmp_path: Path) -> None:
    row, text, id_, category = ROWS[name]
    file = write_rows(tmp_path / "copy.jsonl", [row, {"prompt": "converted"}])
    section = SourceSection(preset=name, path=str(file))
    source = Source(name, "", "", PRESETS[name].columns, section, open_prompts(file))
    first, second = (read_prompt_row(row.value) for row in source.rows())
    assert (first.messages[0]["content"], first.id, first.category) == (text, id_, category)
    assert second.messages[0]["content"] == "converted"
    assert PRESETS[name].repository in list_presets()


def test_mistakes_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}])

    def refuse(prepare_section: dict[str, Any], *more: object) -> str:
        result = run_here(
            "synth",
            "prepare",
            "-r",
            write_recipe(tmp_path, prepare_section),
            "-o",
            tmp_path / "out",
            *more,
            check=False,
        )
        assert result.returncode == 2
        return result.stderr

    here = {"path": str(file)}
    assert "one of ultrachat, sharegpt" in refuse({"sources": [{"preset": "ultra"}]})
    assert "Set `path` to a local copy" in refuse({"sources": [{"preset": "magpie"}]})
    assert "the name 'a' twice" in refuse({"sources": [here, here]})
    assert "a source names a preset or a path" in refuse({"sources": [{"weight": 2}]})
    assert "set prepare.num_rows" in refuse({"sources": [{**here, "weight": 2}]})
    assert "Did you mean 'num_rows'?" in refuse({"sources": [here], "num_row": 2})
    assert "--against mt_bench=FILE.jsonl" in refuse({"sources": [here], "against": None})
    assert "all rows removed" in refuse({"sources": [here], "max_per_category": {"*": 0}})
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    detect_language.__globals__["_load"].cache_clear()
    assert "pip install -e '.[languages]'" in refuse({"sources": [here], "max_per_language": {"de": 1}})
    bare = tmp_path / "bare.yaml"
    bare.write_text("target: {path: nowhere, max_model_len: 8}\n")
    result = run_here("synth", "prepare", "-r", bare, "-o", tmp_path / "out", check=False)
    assert "Add a `prepare` section" in result.stderr


def test_without_a_choice_all_sets_that_bench_knows_are_kept_out() -> None:
    from synth.prepare import find_sets

    assert find_sets(PrepareSection(sources=[SourceSection(path="x")])) == list(SOURCES)


def test_conversations_are_checked_by_prompt_and_by_reply(tmp_path: Path) -> None:
    rng = random.Random(0)
    question = make_text(rng, 20)
    write_rows(tmp_path / "questions.jsonl", [{"prompt": question}])
    pairs = [(question.upper(), "No."), ("Give an example.", f"It is: {question}!"), ("Hi", "Hello")]
    rows = [
        {"id": f"c{n}", "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for n, (a, b) in enumerate(pairs)
    ]
    write_rows(tmp_path / "conversations.jsonl", rows)
    args = ("--against", tmp_path / "questions.jsonl", "--output", tmp_path / "overlap.jsonl")
    printed = run_here("synth", "overlap", tmp_path / "conversations.jsonl", *args).stdout
    assert "2 of 3 rows with 1 questions" in printed
    assert "1 by their prompt, 1 by a reply alone" in printed
    found = read_lines(tmp_path / "overlap.jsonl")
    assert [(row["id"], row["matches"][0]["in_reply"]) for row in found] == [("c0", False), ("c1", True)]

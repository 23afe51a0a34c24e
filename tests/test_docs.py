"""Claims about the pages: links, commands, keys and tests that they name exist, and quoted output is real."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import reference
import yaml
from conftest import ROOT, run_here
from written import write_conversations

from common.section import Section
from drafts import METHODS
from recipe.recipe import Recipe
from recipe.renamed import RENAMED

PATTERNS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "recipes/*/README.md", "chat_templates/README.md")
PAGES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FENCE = re.compile(r"^ *```")


@functools.cache
def lines_of(page: Path) -> list[tuple[int, str, bool]]:
    """Number and text of each line of a page, and whether it is code. Indented text of a list is none."""
    fenced, previous, in_list, was_code, found = False, "", False, False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if FENCE.match(line):
            fenced, previous = not fenced, ""
            continue
        indented = line.startswith("    ") and (was_code or (not previous.strip() and not in_list))
        was_code = fenced or indented or (was_code and not line.strip())
        in_list = bool(re.match(r"(\* |\d+\. )", line)) or (in_list and (not line.strip() or line.startswith(" ")))
        found.append((number, line, fenced or indented))
        previous = line
    return found


def commands_of(page: Path) -> Iterator[tuple[str, str]]:
    """Yield `(place, command)` of every command line in a page's code; a backslash continues a line.

    Commands that are shown with the error that they end with are left out.
    """
    lines = lines_of(page)
    command, start = "", 0
    for (number, line, is_code), (_, following, _) in zip(lines, [*lines[1:], (0, "", False)], strict=True):
        if not is_code:
            command = ""
            continue
        if not command:
            start = number
        command += re.sub(r"^\s*\$ ", "", line).strip()
        if command.endswith("\\"):
            command = command[:-1]
            continue
        if not following.strip().startswith("error: "):
            yield f"{page.relative_to(ROOT)}:{start}", command
        command = ""


def slug(heading: str) -> str:
    """The anchor that a code host and the site give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors_of(page: Path) -> set[str]:
    headings = [line.lstrip("#") for _, line, is_code in lines_of(page) if not is_code and re.match(r"#+ ", line)]
    slugs = [slug(heading) for heading in headings]
    assert len(set(slugs)) == len(slugs), f"{page}: a heading twice, whose anchors differ between hosts"
    return set(slugs)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_relative_link_and_anchor_of_a_page_resolves(page: Path) -> None:
    text = "\n".join(line for _, line, is_code in lines_of(page) if not is_code)
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors_of(file)):
            wrong.append(target)
    assert not wrong


def words_of(text: str) -> list[str] | None:
    """The words of a line that calls one of our commands; None for any other line."""
    if re.match(r"\w+  ", text):  # a table of some output
        return None
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # output, with an apostrophe
        return None
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"] and "train.cli" in words:
        words = ["train", *words[words.index("train.cli") + 1 :]]
    words = [word for word in words if word not in ("...", "[...]")]
    known = len(words) > 1 and words[0] in reference.STAGES and re.fullmatch(r"[a-z]+", words[1])
    return words if known else None


def mistakes_in(words: list[str], *, is_whole: bool) -> str:
    """What is wrong with a command line, or "". A line that leaves out a part may lack options that are required."""
    commands = reference.load_app(words[0]).commands
    command = commands.get(words[1])
    if command is None:
        return f"no command {words[1]}"
    if is_whole:
        try:
            command.make_context(words[1], words[2:])
        except Exception as error:  # click's, of which typer exports no base
            return str(error)
    else:
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in words[2:] if word.startswith("-") and word.partition("=")[0] not in known]
        if unknown:
            return f"no option {unknown[0]}"
    sets = [value for word, value in itertools.pairwise(words) if word == "--set"]
    return next((f"no key {key}" for value in sets if not is_key(key := value.partition("=")[0])), "")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_line_of_a_page_parses(page: Path) -> None:
    wrong = []
    for place, text in commands_of(page):
        words = words_of(text)
        if words is not None and (mistake := mistakes_in(words, is_whole=not re.search(r"\.\.\.|\$| \[", text))):
            wrong.append(f"{place}: {text}: {mistake}")
    assert not wrong, "\n".join(wrong)


def test_command_lines_are_found_in_indented_and_fenced_code_and_in_lists() -> None:
    found = {page.name: sum(words_of(text) is not None for _, text in commands_of(page)) for page in PAGES}
    assert found["new-prompts.md"] == 5
    assert found["quickstart.md"] == 9
    assert sum(found.values()) > 120


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("train offline -r a.yaml --store s --output o", ""),
        ("train offline -r a.yaml --store s --output o --parallel ddp", "--parallel"),
        ("train offline -r a.yaml --store s", "Missing parameter: output"),
        ("train offlin -r a.yaml", "no command offlin"),
        ("train offline -r a --store s -o o --set train.steps=3", "no key train.steps"),
        ("HF_HOME=x torchrun --standalone -m train.cli offline -r a.yaml --store s -o o --folow", "--folow"),
    ],
)
def test_a_wrong_command_line_is_found(text: str, mistake: str) -> None:
    words = words_of(text)
    assert words is not None
    found = mistakes_in(words, is_whole=True)
    assert mistake in found if mistake else not found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_script_and_make_target_of_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for place, text in commands_of(page):
        words = text.split()
        if words[:1] == ["make"] and words[1:] and not {word for word in words[1:2] if "=" not in word} <= targets:
            wrong.append(f"{place}: {text}")
        for word in re.findall(r"(?:^|\s)((?:recipes|benchmarks|tests|distributed)/[\w./-]+\.(?:py|sh|yaml))", text):
            if not (ROOT / word).is_file():
                wrong.append(f"{place}: {word}")
    assert not wrong, "\n".join(wrong)


def is_key(name: str) -> bool:
    """Whether a dotted name is a key of a recipe: of any draft method, below `train.draft`."""
    section, *keys = name.split(".")
    found: list[Any] = [field.annotation for key, field in Recipe.model_fields.items() if key == section]
    for key in keys:
        found = [inner for annotation in found for inner in step(annotation, key, section)]
    return bool(found)


def step(annotation: Any, key: str, section: str) -> list[Any]:
    """The types that `key` has in values of a type."""
    if get_origin(annotation) is dict:
        return [get_args(annotation)[1]]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = [annotation.model_fields]
        if annotation.__name__ == "DraftSection":
            fields = [method.section.model_fields for method in METHODS.values()]
        return [own[key].annotation for own in fields if key in own]
    return [inner for arg in get_args(annotation) for inner in step(arg, key, section)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_recipe_key_that_a_page_names_exists(page: Path) -> None:
    sections = "|".join(Recipe.model_fields)
    wrong = []
    for number, line, is_code in lines_of(page):
        for name in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[\w-]+)+", line) if not is_code else []:
            if re.search(r"\.(cli|py|jsonl?|yaml|html|md|csv|png|log|safetensors)$", name) or name in RENAMED:
                continue
            if not is_key(re.sub(r"\.NAME\b", ".any", name)):
                wrong.append(f"{number}: {name}")
    assert not wrong


def test_keys_of_maps_sections_and_methods_are_known_and_others_are_not() -> None:
    for name in ("serve.args.dtype", "serve.purposes.bench.args.x", "train.draft.block_size", "bench.sweep.dataset"):
        assert is_key(name), name
    for name in ("train.block_size", "serve.arg", "train.draft.nothing", "target.facts.size", "nothing.at_all"):
        assert not is_key(name), name


@pytest.mark.parametrize("path", reference.PAGES, ids=lambda path: path.name)
def test_the_generated_pages_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reference.PAGES[path](), "run: python tests/reference.py"


def test_every_key_says_what_it_is() -> None:
    rows = [line.split(" | ") for line in reference.keys_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert not [row[0] for row in rows if not row[3].strip()]


def named_tests(page: Path) -> list[tuple[str, str, str]]:
    """`(file, test, case)` of each test that a page names."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^`]+)\])?`", page.read_text(encoding="utf-8"))


def test_each_line_on_bad_drafts_names_a_test_that_seeds_its_defect() -> None:
    page = ROOT / "docs/bad-draft.md"
    proven = [line for line in page.read_text().splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    rows = [line for line in proven if "shown by" not in line]
    assert len(rows) > 30
    assert all("`tests/" in row for row in rows)
    for file, test, case in named_tests(page):
        text = (ROOT / file).read_text(encoding="utf-8")
        functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
        assert test in functions, f"{file}::{test}"
        assert case in text, f"{file}::{test}[{case}]"


def test_what_the_page_on_bad_drafts_quotes_is_what_a_test_or_the_code_says() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("bench", "dump", "train", "serve", "target", "contracts", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "test_docs.py"
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings in two lines
    missing = []
    for line in (ROOT / "docs/bad-draft.md").read_text(encoding="utf-8").splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 5 and (quote := re.fullmatch(r"`([^`]+)`", cells[3])) and quote[1] not in code:
            missing.append(quote[1])
    assert not missing


QUOTED = [
    (page.name, command, output)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for command, output in re.findall(r"^    \$ (.+)\n((?:    (?!\$).+\n)+)", page.read_text("utf-8"), re.MULTILINE)
    if re.match(r"(dump|train) plan .*recipes/Qwen3-8B", command)
]


def test_a_page_quotes_plans() -> None:
    assert [page for page, _, _ in QUOTED] == ["quickstart.md", "quickstart.md"]


@pytest.mark.parametrize(("page", "command", "output"), QUOTED, ids=lambda text: text[:20])
def test_a_quoted_plan_is_what_the_command_prints(page: str, command: str, output: str) -> None:
    printed = run_here(*shlex.split(command)).stdout
    assert re.sub(r"^    ", "", output, flags=re.MULTILINE) == printed


def test_the_script_that_reads_a_store_runs_and_finds_the_generated_tokens(
    recipe_path: Path,
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs/read-a-store.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    (tmp_path / "read_store.py").write_text(script)
    conversations, store = write_conversations(target_folder, tmp_path / "synth", 3), tmp_path / "store"
    args = ("-r", recipe_path, "--backend", "hf", "--no-preflight")
    run_here("dump", "run", *args, "--conversations", conversations, "--output", store)
    monkeypatch.setattr(sys, "argv", ["read_store.py", str(store), str(target_folder)])
    runpy.run_path(str(tmp_path / "read_store.py"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all("10 of 10 predicted" in line for line in printed), printed


def test_every_page_has_its_place_in_the_site() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs.yml names a Python object."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def pages(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from pages(inner)

    assert sorted(pages(nav)) == sorted(NAMES)


def test_the_readme_answers_within_two_clicks() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    near = {(ROOT / path).resolve() for path in re.findall(r"\]\(([\w./-]+\.md)", readme)}
    far = {
        (page.parent / path).resolve()
        for page in near
        for path in re.findall(r"\]\(([\w./-]+\.md)", page.read_text("utf-8"))
    }
    assert {page.resolve() for page in PAGES} <= near | far | {ROOT / "README.md"}

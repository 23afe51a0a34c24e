"""Build a prompt set from several sources: mixed, deduplicated, and without the questions of evaluation sets.

Reads:  the sources of the recipe's `prepare` section, evaluation sets (contracts/evaluation_sets.py).
Writes: OUTPUT/prompts.jsonl (for `synth generate`), removed.jsonl (every other row, with its step, reason and match),
        manifest.json (sources with licenses and checksums, settings, counts by source and step). OUTPUT/work/ holds
        the finished scans of an unfinished run.

The steps, in this order; each row ends at one of them:

    unusable        no prompt that the target could answer (contracts/prompts.py)
    length          too short or too long
    overlap         overlaps with an evaluation question (contracts/overlap.py)
    duplicate       an earlier row has the same normalized text
    near_duplicate  an earlier row that stays is similar (common/minhash.py)
    category        beyond its category's cap
    language        beyond its language's cap
    share           beyond its source's share or limit
    kept            in the prompt set

Which rows caps and shares leave, and their order, is a draw that depends on the rows' texts and the seed alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from common.errors import IncompleteError, UserError
from common.files import hash_file, replace_file, write_json
from common.progress import track
from contracts.evaluation_sets import SOURCES, EvaluationSet, open_evaluation_set
from contracts.overlap import MAX_SHARED, MIN_WORDS, NEAR, OverlapIndex, Question, read_questions
from contracts.prepared import MANIFEST_FILE, PROMPTS_FILE, REMOVED_FILE
from contracts.run import Run
from recipe.prepare import PrepareSection
from recipe.recipe import Recipe
from synth.language import load_detector
from synth.prepare_pool import Pool
from synth.prepare_scan import Checks, scan_source, write_line
from synth.prepare_sources import Source, open_sources
from synth.prompt_length import PromptLength

STAGE = "synth prepare"
FORMAT = 1
STEPS = ("unusable", "length", "overlap", *Pool.STEPS[1:], "kept")


def prepare(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Write the prompt set of the recipe's `prepare` section to `output`; return its manifest.

    Raises UserError for a source or an evaluation set that cannot be read, or if no row is left; IncompleteError if
    the counts do not add up.
    """
    section = recipe.preparing()
    sources = open_sources(section.sources)
    against = [open_evaluation_set(text, "--against") for text in find_sets(section)]
    length = PromptLength(recipe, section.min_tokens, section.max_tokens) if _has_limits(section) else None
    if section.max_per_language:
        load_detector()
    run = _open_run(recipe, sources, against, length, output)
    if run.complete:
        shutil.rmtree(output / "work", ignore_errors=True)  # a run may be killed after its last file
        print(f"prepare: {output} is finished, skipped")
        return dict(run.state["summary"])
    questions, sets = read_all(against)
    overlaps = OverlapIndex(questions, section.ngram, section.near_duplicates or NEAR) if questions else None
    checks = Checks(overlaps, length, bool(section.max_per_language))
    folders = [output / "work" / f"{place:03d}" for place in range(len(sources))]
    for source, folder in zip(sources, folders, strict=True):
        scan_source(source, checks, folder)
        run.tick()
    with Pool(folders, section.seed) as pool:
        choose(pool, section)
        written = write_rows(pool, sources, folders, output)
        counts = count_steps(pool, sources)
    manifest = {
        "format": FORMAT,
        "settings": run.state["settings"],
        "sources": [{**source.describe(), "counts": of} for source, of in zip(sources, counts.values(), strict=True)],
        "evaluation_sets": sets,
        "unchecked_sets": [name for name in SOURCES if name not in {found.name for found in against}],
        "overlap": {"ngram": section.ngram, "min_words": MIN_WORDS, "max_shared": MAX_SHARED},
        **written,
    }
    write_json(output / MANIFEST_FILE, manifest)
    print(show_counts(counts))
    if not written["output"]["rows"]:
        raise UserError(
            output / REMOVED_FILE,
            found="all rows removed",
            expected="some left",
            fix="Look at the reasons; change caps.",
        )
    run.finish(manifest)
    shutil.rmtree(output / "work")
    num_rows = written["output"]["rows"]
    print(f"prepare: {num_rows} prompts in {run.seconds:.0f} s -> {output / PROMPTS_FILE}")
    return manifest


def _open_run(
    recipe: Recipe,
    sources: Sequence[Source],
    against: Sequence[EvaluationSet],
    length: PromptLength | None,
    output: Path,
) -> Run:
    return Run.open(
        output,
        STAGE,
        settings={
            "format": FORMAT,
            "rensa": version("rensa"),
            "prepare": {**recipe.preparing().settings(), "against": [found.name for found in against]},
            **({"target": length.settings} if length else {}),
        },
        inputs={
            **{f"source {source.name}": source.prompts.checksum for source in sources},
            **{f"evaluation set {found.name}": found.checksum for found in against},
        },
        recipe_yaml=recipe.to_yaml(),
    )


def find_sets(section: PrepareSection) -> list[str]:
    """Return the evaluation sets to keep out: those of the recipe, or all that are known."""
    return list(SOURCES) if section.against is None else section.against


def read_all(against: Sequence[EvaluationSet]) -> tuple[list[Question], list[dict[str, Any]]]:
    """Return the questions of all sets, and what the manifest says of each. Raises UserError for an empty one."""
    questions: list[Question] = []
    described = []
    for found in against:
        of_set = list(read_questions(found))
        usable = [question for question in of_set if question is not None]
        if not usable:
            raise UserError(
                f"--against {found.name}", found="no question", expected="prompt rows", fix="Give the set's questions."
            )
        questions += usable
        unusable = len(of_set) - len(usable)
        described.append(
            {"name": found.name, "origin": found.origin, "sha256": found.checksum, "questions": len(usable)}
            | ({"unusable": unusable} if unusable else {})
        )
    return questions, described


def choose(pool: Pool, section: PrepareSection) -> None:
    """Remove duplicates, and what is beyond caps and shares."""
    pool.remove_duplicates()
    if section.near_duplicates is not None:
        pool.remove_near_duplicates(section.near_duplicates)
    pool.cap("category", section.max_per_category)
    pool.cap("language", section.max_per_language)
    sources = section.sources
    pool.share(section.num_rows, [source.weight for source in sources], [source.max_rows for source in sources])


def write_rows(pool: Pool, sources: Sequence[Source], folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the prompt set and the removed rows; return their sizes and checksums, and the output's categories."""
    drawn = pool.drawn()
    with replace_file(output / PROMPTS_FILE) as file:
        for place in track(drawn, "write", "row"):
            file.write(pool.line(int(place)))
    num_removed = 0
    with replace_file(output / REMOVED_FILE) as file:
        for folder in folders:
            with (folder / REMOVED_FILE).open("rb") as lines:
                for line in lines:
                    file.write(line)
                    num_removed += 1
        for place in np.flatnonzero(pool.step):
            file.write(write_line(describe_removed(pool, sources, int(place))))
            num_removed += 1
    names = (("categories", pool.categories, pool.category), ("languages", pool.languages, pool.language))
    by_name = {key: _count(table, numbers[drawn]) for key, table, numbers in names if table}
    files = {"prompts": output / PROMPTS_FILE, "removed": output / REMOVED_FILE}
    sums = {key: hash_file(path) for key, path in files.items()}
    return {
        "output": {"file": PROMPTS_FILE, "rows": len(drawn), "sha256": sums["prompts"], **by_name},
        "removed": {"file": REMOVED_FILE, "rows": num_removed, "sha256": sums["removed"]},
    }


def describe_removed(pool: Pool, sources: Sequence[Source], place: int) -> dict[str, Any]:
    """Return the line of a row that the pool removed."""
    value = orjson.loads(pool.line(place))
    step = Pool.STEPS[pool.step[place]]
    line = {"source": value["source"], "row": int(pool.row[place]), "id": value["id"], "step": step}
    match = int(pool.match[place])
    if match >= 0:
        other = {"source": sources[pool.source[match]].name, "row": int(pool.row[match])}
        alike = {"similarity": round(float(pool.alike[place]), 3)} if step == "near_duplicate" else {}
        return {**line, "reason": f"{step} of {other['source']}, row {other['row']}", "match": {**other, **alike}}
    beyond = {"category": value["category"], "language": value.get("language"), "share": value["source"]}[step]
    return {**line, "reason": f"beyond the {'cap' if step != 'share' else 'share'} of {beyond}"}


def count_steps(pool: Pool, sources: Sequence[Source]) -> dict[str, dict[str, int]]:
    """Return the rows of each source by the step at which they ended. Raises IncompleteError if they do not add up."""
    counts = {}
    for number, (source, scan) in enumerate(zip(sources, pool.scans, strict=True)):
        of_pool = np.bincount(pool.step[pool.source == number], minlength=len(Pool.STEPS))
        found = {**scan["counts"], **dict(zip(Pool.STEPS, of_pool.tolist(), strict=True))}
        ended = {step: int(found.get(step, 0)) for step in STEPS}
        if sum(ended.values()) != source.prompts.num_rows:
            raise IncompleteError(
                f"{source.name}: found {sum(ended.values())} rows in all steps ({ended}), expected "
                f"{source.prompts.num_rows} as in the input. The input changed while it was read: run again."
            )
        counts[source.name] = {"input": source.prompts.num_rows, **ended}
    return counts


def show_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return a table of the rows by source and step."""
    total = {step: sum(of[step] for of in counts.values()) for step in ("input", *STEPS)}
    shown = [step for step in total if total[step] or step in ("input", "kept")]
    width = max(len(name) for name in chain(counts, ["source", "all"]))
    lines = ["  ".join([f"{'source':<{width}}", *(f"{step:>{max(9, len(step))}}" for step in shown)])]
    for name, of in {**counts, "all": total}.items():
        lines.append("  ".join([f"{name:<{width}}", *(f"{of[step]:>{max(9, len(step))}}" for step in shown)]))
    return "\n".join(lines)


def _count(names: Sequence[str], numbers: np.ndarray) -> dict[str, int]:
    """Return how often each name occurs among its numbers."""
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return {name: count for name, count in sorted(zip(names, counts, strict=True)) if count}


def _has_limits(section: PrepareSection) -> bool:
    return section.max_tokens is not None or section.min_tokens > 0

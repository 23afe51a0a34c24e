"""A task file for lm-eval with local data, as a user would write one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
description: "{{{{system}}}}"
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}}}
process_results: !function scores.score
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: same_name, aggregation: mean, higher_is_better: true}}
"""
SCORES = """
def score(doc, results):
    (reply,), answer = results, doc["answer"]
    name = [text.split("`")[1:2] for text in (reply, answer)]
    return {"exact_match": float(reply == answer), "same_name": float(name[0] == name[1])}
"""


def write_task(folder: Path, name: str, rows: Sequence[Mapping[str, str]], until: Sequence[str] = ()) -> Path:
    """Write a task whose rows have system, question and answer; return its folder.

    It scores whether a reply is the answer, and whether both have the same first name in backticks.
    """
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, until=json.dumps(list(until))))
    (folder / "scores.py").write_text(SCORES)
    return folder

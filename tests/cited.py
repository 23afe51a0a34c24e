"""A small trained draft, and everything that its certificate cites: data, evaluation, and folders of `bench`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_here
from written import write_store

from bench.accuracy import SIDES, Evaluation, measure
from bench.replay import make_report
from bench.requests import Answer, Turn, answers_to_json
from common.files import hash_json, write_json
from contracts.conversation import CONVERSATIONS_FILE
from recipe.load import load_recipe
from serve.command import fingerprint_draft
from target.target import Target

SAMPLING = {"thinking_modes": ["enabled"], "temperature": [0.0], "tool_call_parser": None}
FIGURES = {"n": 2, "acceptance_length": 1.5, "interval": [1.0, 2.0]}
OVERLAP = {
    "training": [{"path": "/home/somebody/train.jsonl", "rows": 9, "sha256": "e" * 64}],
    "sets": {"held_out": {"rows": 4, "overlapping": 1}},
    "rows": [{"text": "words of a question"}],
    "acceptance": {"3": {"all": FIGURES, "without_overlap": FIGURES, "overlap_only": None}},
}
TRACKERS = {"wandb": {"run_id": "r1", "url": "https://wandb.ai/r1"}, "mlflow": {"url": "file:///home/somebody"}}
LOSSLESS = {"replies": 9, "identical": 8, "ties": 1, "tolerance": 0.001, "num_chats": 1, "passes": [{"concurrency": 8}]}


@dataclass
class Cited:
    folder: Path
    recipe_path: Path
    target: Target

    @property
    def recipe(self) -> list[object]:
        return ["--recipe", self.recipe_path]

    @cached_property
    def conversations(self) -> Path:
        folder = self.folder / "conversations"
        folder.mkdir()
        (folder / CONVERSATIONS_FILE).write_text('{"id": "a"}\n{"id": "b"}\n')
        write_run(
            folder, "synth generate", {"prompts": hash_json(["f" * 64])}, {"synth": SAMPLING}, {"done": 2, "failed": 0}
        )
        return folder

    @cached_property
    def prompts(self) -> Path:
        path = self.folder / "manifest.json"
        sources = [
            {"name": "chat", "origin": "org/set", "rows": 20, "license": "cc-by-4.0", "counts": {"kept": 18}},
            {"name": "own", "origin": "/data/own.jsonl", "rows": 4, "license": None, "counts": {"kept": 4}},
        ]
        made = {"output": {"sha256": "f" * 64}, "sources": sources, "evaluation_sets": [{"name": "gsm8k"}]}
        path.write_text(json.dumps(made))
        return path

    @cached_property
    def store(self) -> Path:
        return write_store(self.folder / "store", self.target, conversations=self.conversations)

    @cached_property
    def run(self) -> Path:
        run_here("train", "offline", *self.recipe, "--store", self.store, "--output", self.folder / "run")
        (self.folder / "run/trackers.json").write_text(json.dumps({"trackers": TRACKERS}))
        return self.folder / "run"

    @cached_property
    def evaluation(self) -> Path:
        path = self.folder / "eval.json"
        run_here("train", "eval", *self.recipe, "--run", self.run, "--store", self.store, "--output", path)
        return path

    @cached_property
    def fingerprint(self) -> str:
        self.export("plain")
        return fingerprint_draft(load_recipe(self.recipe_path), self.folder / "plain")

    @cached_property
    def served(self) -> Path:
        """A folder of `bench acceptance --conversations`: two replies, with K = 1 and K = 3."""
        folder = self.folder / "bench"
        settings = {"serve": {"flags": {"dtype": "float32"}}}
        write_run(folder, "bench acceptance", self.inputs, settings, {}, {"vllm": "0.32.0"})
        turns = [Turn("a-0-1", "enabled", "x", [0], [1, 2, 3], dataset="held_out"),
                 Turn("b-0-1", "disabled", "x", [0], [1, 2], dataset="held_out")]  # fmt: skip
        none, one, three = (self.answers(*accepted) for accepted in ((None, None), (1, 0), (1, 1)))
        report = make_report(turns, none, {1: one, 3: three})
        (folder / "acceptance.json").write_text(json.dumps({**report, "overlap": OVERLAP}))
        return folder

    @cached_property
    def lossless(self) -> Path:
        folder = self.folder / "lossless"
        write_run(folder, "bench lossless", self.inputs, {}, {})
        (folder / "lossless.json").write_text(json.dumps(LOSSLESS))
        return folder

    @cached_property
    def accuracy(self) -> Path:
        """A folder of `bench accuracy`: the draft gets one of ten questions wrong that the target gets right."""
        return self.compare_answers("accuracy", questions=10, wrong=1)

    def compare_answers(self, name: str, questions: int, wrong: int) -> Path:
        """Run `bench accuracy` on answers that are there already; lm-eval is not loaded and no server started."""
        assert self.fingerprint
        recipe = load_recipe(self.recipe_path, ["bench.accuracy.tasks=[sums]", "bench.accuracy.repeats=1"])
        work = Evaluation(recipe, self.folder / "plain", self.folder / name)
        for side, load in ((side, load) for side in SIDES for load in work.loads):
            scores = [1.0] * questions if side == "base" else [0.0] * wrong + [1.0] * (questions - wrong)
            asked = [
                {"id": n, "prompt": str(n), "replies": [f"{score:g}"], "cut": 0, "metrics": {"acc,none": score}}
                for n, score in enumerate(scores)
            ]
            counters = {"num_drafts": 5, "num_accepted_tokens": 10}
            for kind in work.passes:
                path = work.path(load, side, "sums", kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"tasks": {"sums": asked}, "counters": counters})
        with pytest.MonkeyPatch.context() as patch:
            unused = {"open_tasks": lambda _: None, "load_task": None}
            patch.setitem(sys.modules, "bench.questions", SimpleNamespace(LM_EVAL_VERSION="0.4.9", **unused))
            measure(work)
        return work.output

    @property
    def inputs(self) -> dict[str, str]:
        return {"draft": self.fingerprint, "target": self.target.fingerprint}

    def answers(self, *accepted: int | None) -> dict[str, Any]:
        found = [Answer(id_, [1, 2, 3][:tokens], "stop", [] if a is None else [a], 0.1)
                 for id_, tokens, a in zip(("a-0-1", "b-0-1"), (3, 2), accepted, strict=True)]  # fmt: skip
        steps = [a for a in accepted if a is not None]
        counters = {"num_drafts": len(steps), "num_accepted_tokens": sum(steps)}
        point = {"seconds": 2.0, "tokens": 5, "greedy_identical": 2, "differing": [], "counters": counters,
                 "answers": answers_to_json(found)}  # fmt: skip
        return {"points": {"1": point}}

    def export(self, name: str, *words: object, check: bool = True) -> Any:
        args = [*self.recipe, "--run", self.run, "--output", self.folder / name, *words]
        return run_here("train", "export", *args, check=check)

    @cached_property
    def cited(self) -> list[object]:
        """The options that name everything."""
        return [
            "--eval", self.evaluation, "--eval", f"again={self.evaluation}", "--served", self.served,
            "--served", self.lossless, "--served", self.accuracy, "--store", self.store, "--prompts", self.prompts,
        ]  # fmt: skip

    @cached_property
    def exported(self) -> Path:
        """The export with all figures; tests copy it."""
        self.export("export", *self.cited)
        return self.folder / "export"


def write_run(
    folder: Path,
    stage: str,
    inputs: dict[str, str],
    settings: dict[str, Any],
    summary: dict[str, int],
    environment: dict[str, str] | None = None,
) -> None:
    folder.mkdir(exist_ok=True)
    state = {"stage": stage, "complete": True, "inputs": inputs, "settings": settings, "summary": summary}
    (folder / "run.json").write_text(json.dumps({**state, "environment": environment or {}}))

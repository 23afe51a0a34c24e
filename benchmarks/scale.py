"""Time and memory of what a stage does before its first row, at several numbers of rows.

    python benchmarks/scale.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=RUN/target --work FOLDER \
        [--rows 10000 100000 1000000]

Each step runs in a process of its own, whose peak memory includes Python and torch. The rows are short (a question, a
reply of 20 tokens), the files made with the stages' own writers; the ledger of the store names samples that have no
files. Exits with an error if a start takes 60 s or 2 GiB, or if a step grows more than the rows by half.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contracts.conversation import Conversation, Sample
from contracts.ledger import LedgerWriter
from contracts.prompt_files import open_prompts
from contracts.rolling import RollingStore, Window, write_index
from contracts.run import Run
from contracts.shards import shard_folder, shard_of
from contracts.store import Store
from distributed.plan import StagePlan
from distributed.stage import task_status
from drafts.order import plan_window
from dump.ledger import DumpLedger
from dump.plan import make_plan
from dump.rendered import TemplateMasks
from dump.run import make_manifest
from dump.samples import metadata_of, read_rows
from recipe.load import load_recipe
from recipe.recipe import Recipe
from synth.merge import merge
from synth.output import Output
from synth.prompts import Prompt
from synth.todo import Source, Todo
from target.target import Target
from train.data import Samples

SHARDS = 4
TOKENS = 40
LIMIT_S, LIMIT_GIB, GROWTH = 60.0, 2.0, 1.5


class Files:
    """The files of one number of rows."""

    def __init__(self, recipe: Recipe, folder: Path, num_rows: int) -> None:
        self.recipe, self.folder, self.num_rows = recipe, folder, num_rows
        self.target = Target.here(recipe.target)
        self.prompts, self.synth, self.store = folder / "prompts.jsonl", folder / "synth", folder / "store"

    def make(self) -> None:
        """Write prompts, the shards of a synthesis, and a store's ledger."""
        self.folder.mkdir(parents=True)
        with self.prompts.open("w") as file:
            for number in range(self.num_rows):
                file.write(json.dumps({"id": f"row-{number}", "prompt": f"Question {number}"}) + "\n")
        inputs = {"prompts": open_prompts(self.prompts).checksum, "target": self.target.fingerprint}
        outs, runs = [], []
        for number in range(SHARDS):
            folder = shard_folder(self.synth, number, SHARDS)
            yaml = self.recipe.to_yaml()
            runs.append(Run.open(folder, "synth generate", settings={}, inputs=inputs, recipe_yaml=yaml))
            outs.append(Output(folder, self.num_rows, 1))
        for conversation in self.conversations():
            outs[shard_of(conversation.id, SHARDS)].add(conversation)
        for out, run in zip(outs, runs, strict=True):
            out.close()
            run.finish({**out.counts, "places": self.num_rows, "rows": self.num_rows, "tokens": out.tokens})
        store = Store(self.store)
        store.write_manifest(make_manifest(self.recipe, self.target, self.synth, "0" * 64))
        ledger = LedgerWriter(store.ledger_path)
        entry = {"status": "done", "tokens": TOKENS, "size": 100_000, "sha256": "0" * 64}
        ledger.append({"id": f"{conversation.id}-0", **entry} for conversation in self.conversations())
        ledger.close()

    def conversations(self) -> Iterator[Conversation]:
        """Yield a conversation for each row."""
        for prompt in self._source(self.synth).read(lambda _: True):
            assert isinstance(prompt, Prompt)
            yield Conversation(
                id=prompt.id, source_id=prompt.source_id, index=prompt.index, thinking_mode=prompt.thinking_mode,
                messages=[prompt.messages[0], {"role": "assistant", "content": "A reply."}],
                samples=[Sample(token_ids=[prompt.index % 500] * TOKENS, loss_spans=[(TOKENS // 2, TOKENS)])],
                finish_reason="stop", sampling={"temperature": 0.0}, target={}, template="",
                usage={"completion_tokens": TOKENS // 2},
            )  # fmt: skip

    def walk(self) -> None:
        """synth: the first shard reads the input"""
        _ = self._source(self.folder / "fresh").index

    def start(self) -> None:
        """synth: another shard, or a resume, finds what is to do"""
        source, folder = self._source(self.synth), shard_folder(self.synth, 1, SHARDS)
        out = Output(folder, *source.shape)
        assert Todo.find(source, out, (1, SHARDS), [], retry_failed=False).num_open == 0
        out.close()

    def merge(self) -> None:
        """synth merge"""
        merge(self.synth)

    def plan(self) -> None:
        """dump plan, and the start of a dump"""
        masks = TemplateMasks(self.recipe.target, self.target)
        assert make_plan(self.recipe, self.target, read_rows([self.synth], masks)).samples == self.num_rows

    def resume(self) -> None:
        """dump: the ledger of a resume"""
        assert DumpLedger(self.store / "ledger.jsonl").num_finished == self.num_rows

    def ids(self) -> None:
        """ids and lengths of a store"""
        store = Store(self.store)
        assert len(store.sample_ids()) == len(store.lengths()) == self.num_rows

    def status(self) -> None:
        """distributed status of a task"""
        plan = StagePlan(stage="dump", recipe="", overrides=[], input=str(self.synth), output=str(self.folder))
        (self.folder / "shards").mkdir(exist_ok=True)
        link = plan.task_folder(0)
        if not link.exists():
            link.symlink_to(self.store, target_is_directory=True)
        assert task_status(plan, 0).rows == self.num_rows

    def train(self) -> None:
        """train offline: samples and their order"""
        samples = Samples(Store(self.store), self.recipe.training(), self.recipe.target.max_model_len)
        assert samples._pick(self.num_rows + 7)

    def rolling(self) -> None:
        """dump run --window: the index"""
        store = RollingStore(self.folder / "rolling")
        store.write_manifest(make_manifest(self.recipe, self.target, self.synth, "0" * 64))
        rows = ((f"{found.id}-0", found.samples[0], metadata_of(found)) for found in self.conversations())
        index = write_index(store.index_folder, rows)
        order = self.recipe.training().order(self.recipe.target.max_model_len)
        window = Window(num_bytes=64 << 30, order=order, index=index)
        store.window_path.write_text(window.model_dump_json())

    def follow(self) -> None:
        """train offline --follow, and a resumed capture: index and order"""
        plan = plan_window(RollingStore(self.folder / "rolling"))
        assert plan.end(0) > 0

    def _source(self, folder: Path) -> Source:
        """Return the input, with its index in `folder`."""
        return Source(open_prompts(self.prompts), self.recipe.synth, [0.0], folder)


STEPS: list[Callable[[Files], None]] = [
    Files.walk, Files.start, Files.merge, Files.plan, Files.resume, Files.ids, Files.status, Files.train, Files.rolling,
    Files.follow,
]  # fmt: skip
STARTS = {"start", "resume", "ids", "status", "train", "follow"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_step(files: Files, name: str) -> None:
    """Run a step and print its seconds and this process's peak memory in GiB."""
    started = time.perf_counter()
    getattr(files, name)()
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))


def measure(args: argparse.Namespace, num_rows: int, name: str) -> tuple[float, float]:
    """Run a step in a process of its own; return its seconds and peak GiB."""
    sets = [word for value in args.set for word in ("--set", value)]
    words = ["--recipe", args.recipe, *sets, "--work", args.work, "--rows", num_rows, "--step", name]
    result = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, check=True, text=True)
    seconds, gib = json.loads(result.stdout.splitlines()[-1])
    return seconds, gib


def main() -> None:
    args = parse_args()
    recipe = load_recipe(args.recipe, args.set)
    if args.step:
        run_step(Files(recipe, args.work / str(args.rows[0]), args.rows[0]), args.step)
        return
    found: dict[str, list[tuple[float, float]]] = {step.__name__: [] for step in STEPS}
    for num_rows in args.rows:
        Files(recipe, args.work / str(num_rows), num_rows).make()
        for name, figures in found.items():
            figures.append(measure(args, num_rows, name))
    print(f"| step | {' | '.join(f'{num_rows:,} rows' for num_rows in args.rows)} |")
    print(f"|---|{'---|' * len(args.rows)}")
    problems = []
    for step in STEPS:
        figures = found[step.__name__]
        print(f"| {step.__doc__} | {' | '.join(f'{s:.1f} s, {gib:.2f} GiB' for s, gib in figures)} |")
        seconds, gib = figures[-1]
        if step.__name__ in STARTS and (seconds > LIMIT_S or gib > LIMIT_GIB):
            problems.append(f"{step.__name__} takes {seconds:.0f} s and {gib:.2f} GiB")
        if len(figures) > 1 and seconds > 1 and seconds / figures[-2][0] > GROWTH * args.rows[-1] / args.rows[-2]:
            problems.append(f"{step.__name__} grows faster than the rows")
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()

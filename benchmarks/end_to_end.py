"""Time from the first prompt to a served draft: this pipeline against speculators', on the same machine.

    python benchmarks/end_to_end.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=RUN/target \\
        --prompts RUN/prompts/train.jsonl --held-out RUN/prompts/held_out.jsonl --thinking-mode disabled \\
        --peer-python ENVIRONMENT/bin/python --output OUTPUT [--budget-s 360 | --steps 400] [--smoke]

ENVIRONMENT has speculators 0.9.0. Both sides get the same prompts, target, thinking mode, sampling, captured layers,
draft dimensions, samples a batch, optimizer, learning rate and schedule, and `--budget-s` seconds from the first prompt
to the end of training: two short pilots, which are not counted, tell how many steps fit. `--steps` gives both the same
number instead.

Draftline: `synth generate`, `dump run`, `train offline`, `train export`.
speculators: `regenerate-responses`, `prepare-data`, `generate-offline-data`, `train`; its checkpoint is served as it
is. It ships no server: vLLM of this environment serves the target with the recipe's flags, and its start counts. All
else are its defaults, EAGLE 3.1's norms and D-PACE among them, but for a validation split of 0.1%, and full attention;
DFlash's is marked non-causal, as it is trained, or vLLM would serve it causal. On CPUs its commands run unchanged but
for two parts that need a GPU: the trainer goes through benchmarks/speculators_cpu.py (SDPA, losses without Triton, no
reader processes), and vLLM writes the states with our connector, since its own copies with CUDA.

`bench acceptance` serves up to `--checkpoints` drafts of each side on the same held-out replies. The seconds of a
checkpoint are those of the stages before training, of training until its weights were written, and of its export.

Writes OUTPUT/METHOD/result.json and table.md. Stages that have ended are skipped; an interrupted one starts afresh.
Data are shared by calls for several methods (`--set train.draft.method=...`). Exits with an error if the sides trained
on unlike numbers of generated tokens, or were measured on other replies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.end_to_end_report import (  # noqa: E402
    Point,
    Side,
    Stage,
    compare_times,
    explain_times,
    fit_steps,
    make_curve_table,
    make_stage_table,
    spread,
)
from benchmarks.served_peer import (  # noqa: E402
    check_replies,
    find_checkpoints,
    refuse_untrainable,
    words_of_optimizer,
    write_draft_config,
)
from benchmarks.stage_meter import Stages  # noqa: E402
from common.files import hash_file, read_json, write_atomic, write_json  # noqa: E402
from contracts.draft import DraftRun  # noqa: E402
from contracts.run import Run, read_run  # noqa: E402
from drafts.dflash.config import DFlashSection  # noqa: E402
from recipe.load import load_recipe  # noqa: E402
from recipe.mask import mask_token_of  # noqa: E402
from recipe.recipe import Recipe  # noqa: E402
from recipe.serve import Purpose  # noqa: E402
from serve.command import Serving, build_command  # noqa: E402
from serve.engine import is_cpu_engine  # noqa: E402
from serve.extraction import extraction_args, to_server_args  # noqa: E402
from serve.server import Server, find_port, run_server  # noqa: E402
from serve.settings import measured_settings  # noqa: E402
from target.layers import captured_layers  # noqa: E402
from target.target import Target  # noqa: E402

PILOTS = (10, 60)
"""Steps of the pilots that tell the seconds of a step."""
MAX_DIFFERENCE = 0.1
"""Largest relative difference of the generated tokens that the sides train on: they end conversations otherwise."""
CPU_WORDS = {"draft-attn-impl": "sdpa", "loss-implementation": "eager", "num-workers": 0}


@dataclass(frozen=True)
class Job:
    """What both sides get. `folder`: of the data; `results`: of the draft method."""

    args: argparse.Namespace
    folder: Path
    results: Path

    def recipe(self, *more: str) -> Recipe:
        return load_recipe(self.args.recipe, [*self.args.set, *more])

    def words(self, *more: str) -> list[str]:
        """Return the recipe's options for a command of ours."""
        sets = [*self.args.set, *more]
        return ["--recipe", str(self.args.recipe), *(word for value in sets for word in ("--set", value))]

    def prompts(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"

    def length(self, num_steps: int) -> list[str]:
        """Return the overrides for a training of `num_steps`."""
        warmup = min(self.recipe().training().warmup_steps, num_steps // 2)
        every = math.ceil(num_steps / self.args.checkpoints)
        return [
            f"train.num_steps={num_steps}", f"train.warmup_steps={warmup}", f"train.checkpoint_every={every}",
            f"train.keep_checkpoints={num_steps}",
        ]  # fmt: skip

    def write_prompts(self) -> None:
        """Write the prompts that are used."""
        for split, path, limit in (
            ("train", self.args.prompts, self.args.limit),
            ("held_out", self.args.held_out, self.args.held_out_limit),
        ):
            with path.open(encoding="utf-8") as file:
                write_atomic(self.prompts(split), "".join(islice(file, limit)))


class Pipeline(Protocol):
    """A side: it makes data, trains for some steps, and exports checkpoints."""

    label: str
    data: Stages
    method: Stages

    def make_data(self) -> list[Stage]:
        """Run the stages before training."""

    def num_tokens(self) -> int:
        """Return the generated tokens that training supervises."""

    def train(self, name: str, num_steps: int) -> Stage:
        """Train into the folder `name`."""

    def checkpoints(self, num_steps: int) -> dict[int, Path]:
        """Return the weights of `train`'s checkpoints by step."""

    def export(self, step: int, weights: Path) -> tuple[Path, Stage | None]:
        """Return the folder that vLLM loads, and the stage that wrote it, if one had to."""


class Draftline:
    """This project's commands."""

    label = "draftline"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.data = Stages(job.folder / self.label, self.label)
        self.method = Stages(job.results / self.label, self.label, [self.data.folder])

    def make_data(self) -> list[Stage]:
        synth, store = self.data.folder / "synth", self.data.folder / "store"
        return [
            self.data.run("generate", [synth], lambda: generate(self.job, self.data, "train", synth)),
            self.data.run("extract", [store], lambda: self._dump(synth, store)),
        ]

    def _dump(self, synth: Path, store: Path) -> None:
        words = ("run", *self.job.words(), "--conversations", synth, "--output", store)
        self.data.call("extract", [command("dump"), *words])

    def num_tokens(self) -> int:
        return int(read_run(self.data.folder / "synth", "synth generate")["summary"]["tokens"])

    def train(self, name: str, num_steps: int) -> Stage:
        words = self.job.words(*self.job.length(num_steps))
        folder, store = self.method.folder / name, self.data.folder / "store"
        argv = [command("train"), "offline", *words, "--store", store, "--output", folder]
        return self.method.run(name, [folder], lambda: self.method.call(name, argv))

    def checkpoints(self, num_steps: int) -> dict[int, Path]:  # noqa: ARG002
        run = DraftRun(self.method.folder / "train")
        return {step: run.step_folder(step) / "weights.safetensors" for step in run.steps()}

    def export(self, step: int, weights: Path) -> tuple[Path, Stage | None]:
        # `train export` takes a run's last checkpoint: show it the run as it was when this one was the last.
        run, view, output = weights.parent.parent, self.method.folder / f"run-{step}", self.method.folder / f"at-{step}"

        def work() -> None:
            view.mkdir()
            kept = [path for path in run.iterdir() if not path.name.startswith("step-") or path == weights.parent]
            for path in kept:
                (view / path.name).symlink_to(path)
            words = self.job.words(*self.job.length(max(DraftRun(run).steps())))
            argv = [command("train"), "export", *words, "--run", view, "--output", output]
            self.method.call(f"export-{step}", argv)

        return output, self.method.run(f"export-{step}", [view, output], work)


class Speculators:
    """speculators' commands."""

    label = "speculators"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.data = Stages(job.folder / self.label, self.label)
        self.method = Stages(job.results / self.label, self.label, [self.data.folder])
        self._responses, self._prepared = self.data.folder / "responses", self.data.folder / "prepared"
        self._python = job.args.peer_python
        self._env = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    @property
    def _target(self) -> Target:
        return Target.here(self.job.recipe().target)

    def make_data(self) -> list[Stage]:
        staging = self.data.folder / "staging"
        return [
            self.data.run("generate", [self._responses], self._regenerate),
            self.data.run("prepare", [self._prepared], self._prepare),
            self.data.run("extract", [self._prepared / "hidden_states", staging], lambda: self._extract(staging)),
        ]

    def _regenerate(self) -> None:
        recipe, target = self.job.recipe(), self._target.path.resolve()
        with self._serve("synth", {}) as server:
            self._call(
                "regenerate-responses", "--endpoint", f"{server.url}/v1/chat/completions", "--model", target,
                "--dataset", self.job.prompts("train"), "--outfile", self._responses / "rows.jsonl",
                "--concurrency", recipe.synth.concurrency or 64, "--max-tokens", recipe.synth.max_tokens,
                "--sampling-params", json.dumps(sampling_of(recipe, self.job.args.thinking_mode)),
            )  # fmt: skip

    def _prepare(self) -> None:
        self._call(
            "prepare-data", "--model", self._target.path.resolve(), "--data", self._responses / "rows.jsonl",
            "--output", self._prepared, "--seq-length", self.job.recipe().target.max_model_len,
        )  # fmt: skip

    def _extract(self, staging: Path) -> None:
        recipe, target = self.job.recipe(), self._target
        args = extraction_args(recipe, target, captured_layers(recipe.target, target), staging)
        with self._serve("dump", to_server_args(args)) as server:
            words = ("--endpoint", f"{server.url}/v1", "--preprocessed-data", self._prepared, "--fail-on-error")
            self._call("generate-offline-data", *words)

    def _call(self, name: str, *words: object) -> None:
        self.data.call(name, [self._python.with_name("speculators"), name, *words], self._env)

    @contextlib.contextmanager
    def _serve(self, purpose: Purpose, extra: Mapping[str, Any]) -> Iterator[Server]:
        """Serve the target under the name of its folder, where speculators looks for the tokenizer."""
        recipe, target = self.job.recipe(), self._target
        serving = Serving(purpose=purpose, extra_args={**extra, "served-model-name": str(target.path.resolve())})
        built = build_command(recipe, target, port=find_port(recipe.serve.host, recipe.serve.port), serving=serving)
        log = self.data.folder / "logs" / f"server-{purpose}.log"
        with run_server(built, log_path=log, startup_timeout_s=recipe.serve.startup_timeout_s) as server:
            yield server

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        with (self._responses / "rows.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def num_tokens(self) -> int:
        return sum(sum(row["loss_mask"]) for row in self._rows())

    def train(self, name: str, num_steps: int) -> Stage:
        folder = self.method.folder / name
        return self.method.run(name, [folder], lambda: self._train(name, num_steps, folder))

    def _train(self, name: str, num_steps: int, folder: Path) -> None:
        recipe, target = self.job.recipe(*self.job.length(num_steps)), self._target
        section, config = recipe.training(), self.method.folder / "draft-config.json"
        write_draft_config(recipe, target, config)
        lengths = [len(row["input_ids"]) for row in self._rows()]
        batch = max(round(section.global_batch_size * sum(lengths) / len(lengths)), max(lengths))
        words = {
            "verifier-name-or-path": target.path.resolve(), "data-path": self._prepared, "draft-config": config,
            "mask-token-id": mask_token_of(recipe, target) or 0, "total-seq-len": batch, "train-data-ratio": 0.999,
            "on-missing": "raise", "log-freq": 10, "hidden-states-dtype": "bfloat16" if section.bf16 else "float32",
            "epochs": 1 + math.ceil(num_steps * batch / sum(lengths)), "checkpoint-freq": 1, "save-path": folder,
            "log-dir": self.method.folder / "logs", **words_of_optimizer(section), **words_of_draft(recipe, batch),
            **(CPU_WORDS if is_cpu_engine() else {}),
        }  # fmt: skip
        # speculators counts layers from the embeddings, as vLLM does.
        layers = [layer_id + 1 for layer_id in captured_layers(recipe.target, target)]
        program = [self._python, ROOT / "benchmarks/speculators_cpu.py"]
        if not is_cpu_engine():
            program = [self._python.with_name("speculators"), "train"]
        options = [word for key, value in words.items() for word in (f"--{key}", value)]
        switches = ["--sliding-window-non-causal"] if isinstance(section.draft, DFlashSection) else []
        self.method.call(name, [*program, *options, *switches, "--target-layer-ids", *layers], self._env)
        if num_steps not in find_checkpoints(folder):
            raise SystemExit(
                f"{folder}: found checkpoints of steps {sorted(find_checkpoints(folder))}, not {num_steps}"
            )

    def checkpoints(self, num_steps: int) -> dict[int, Path]:
        # Its loop takes a step in each epoch that is left after --max-steps.
        found = find_checkpoints(self.method.folder / "train")
        return {step: path for step, path in sorted(found.items()) if step <= num_steps}

    def export(self, step: int, weights: Path) -> tuple[Path, Stage | None]:  # noqa: ARG002
        return weights.parent, None


def words_of_draft(recipe: Recipe, batch: int) -> dict[str, object]:
    """Return speculators' options for the draft's method and number of draft tokens; `batch`: tokens of a batch."""
    section = recipe.training()
    draft = section.draft
    if isinstance(draft, DFlashSection):
        anchors = min(draft.num_anchors * section.global_batch_size, batch)
        return {"speculator-type": "dflash", "block-size": draft.block_size, "max-anchors": anchors}
    return {"speculator-type": draft.method, "ttt-steps": draft.num_draft_tokens}


def sampling_of(recipe: Recipe, mode: str) -> dict[str, Any]:
    """Return the request's sampling and thinking mode, as `synth generate` sends them. Exits for several at once."""
    if isinstance(recipe.synth.temperature, list) or recipe.synth.num_samples > 1:
        raise SystemExit("synth: found several temperatures or samples of a prompt, expected one")
    keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    params = {key: value for key in keys if (value := getattr(recipe.synth, key)) is not None}
    if mode:
        value = recipe.target.thinking_mode_values.get(mode, mode)
        params["chat_template_kwargs"] = {recipe.target.thinking_mode_name: value}
    return params


def command(name: str) -> Path:
    """Return a console command of this environment."""
    return Path(sys.executable).with_name(name)


def generate(job: Job, stages: Stages, split: str, output: Path) -> None:
    """Have the target answer the prompts."""
    words = ("--prompts", job.prompts(split), "--output", output, "--thinking-modes", job.args.thinking_mode)
    stages.call(f"generate-{split}", [command("synth"), "generate", *job.words(), *words])


def run_side(job: Job, side: Pipeline) -> tuple[list[Stage], dict[int, tuple[float, Path]]]:
    """Make data, train and export; return the counted stages and seconds and folder of the exports by step."""
    stages = side.make_data()
    before = sum(stage.seconds for stage in stages)
    num_steps = job.args.steps
    if num_steps is None:
        pilots = [(steps, side.train(f"pilot-{steps}", steps).seconds) for steps in PILOTS]
        try:
            num_steps = fit_steps(job.args.budget_s - before, pilots)
        except ValueError as error:
            raise SystemExit(f"{side.label}: {error}") from None
        print(f"{side.label}: {num_steps} steps fit into {job.args.budget_s - before:.0f} s", flush=True)
    trained = side.train("train", num_steps)
    found = side.checkpoints(num_steps)
    exports, last = {}, None
    for step in spread(sorted(found), job.args.checkpoints):
        folder, last = side.export(step, found[step])
        seconds = before + found[step].stat().st_mtime - trained.started + (last.seconds if last else 0.0)
        exports[step] = seconds, folder
    return [*stages, trained, *([Stage(**{**asdict(last), "name": "export"})] if last else [])], exports


def serve(job: Job, label: str, step: int, draft: Path) -> dict[str, Any]:
    """Measure a draft on the held-out replies; return the report."""
    output, baseline = job.results / f"bench/{label}-{step}", job.folder / "baseline.json"
    if not (output / "acceptance.json").exists():
        output.mkdir(parents=True, exist_ok=True)
        if baseline.exists():  # the target without a draft answers alike for all of them
            shutil.copy(baseline, output)
        print(f"{label}: serving step {step} ...", flush=True)
        words = job.words(f"bench.concurrency=[{max(job.recipe().bench.concurrency)}]")
        tokens = job.recipe().training().draft.num_draft_tokens
        argv = [command("bench"), "acceptance", *words, "--conversations", job.folder / "held_out", "--draft", draft,
                "--output", output, "--draft-tokens", tokens]  # fmt: skip
        Stages(job.results, label).call(f"bench-{label}-{step}", argv)
        if not baseline.exists():
            shutil.copy(output / "baseline.json", baseline)
    return dict(read_json(output / "acceptance.json", "a finished benchmark"))


def measure(job: Job) -> None:
    """Run both sides, serve their checkpoints, and write the report. Exits if they did unlike work."""
    pipelines: list[Pipeline] = [Draftline(job), Speculators(job)]
    held_out = Stages(job.folder, "held out")
    replies = job.folder / "held_out"
    held_out.run("held_out", [replies], lambda: generate(job, held_out, "held_out", replies))
    built = {side.label: run_side(job, side) for side in pipelines}
    tokens = {side.label: side.num_tokens() for side in pipelines}
    check_tokens(tokens)
    reports = {
        label: {step: serve(job, label, step, folder) for step, (_, folder) in exports.items()}
        for label, (_, exports) in built.items()
    }
    sides = {
        label: Side(
            stages,
            [Point(step, seconds, reports[label][step]["acceptance_length"]) for step, (seconds, _) in exports.items()],
        )
        for label, (stages, exports) in built.items()
    }
    ours, peer = sides.values()
    last = [reports[label][max(reports[label])] for label in sides]
    check_replies(*last)
    found = compare_times(ours, peer)
    told = explain_times(found, (pipelines[0].label, pipelines[1].label), job.args.aim)
    lengths = ", ".join(f"{label} {number:,}" for label, number in tokens.items())
    table = "\n\n".join([make_stage_table(sides), make_curve_table(sides), f"Generated tokens: {lengths}.", told])
    write_atomic(job.results / "table.md", table + "\n")
    write_json(
        job.results / "result.json",
        {"sides": {label: asdict(side) for label, side in sides.items()}, "tokens": tokens, "equal": found},
    )
    print(f"\n{table}\n\n-> {job.results}")


def check_tokens(tokens: Mapping[str, int]) -> None:
    """Exit if the sides train on unlike numbers of generated tokens."""
    fewest, most = min(tokens.values()), max(tokens.values())
    if most - fewest > MAX_DIFFERENCE * most:
        raise SystemExit(f"the sides train on unlike data: found {dict(tokens)} generated tokens")


def open_runs(job: Job) -> tuple[Run, Run]:
    """Lock both folders; refuse other inputs or settings than those they were begun with."""
    args, recipe = job.args, job.recipe()
    shared = {"limit": args.limit, "held_out_limit": args.held_out_limit, "thinking_mode": args.thinking_mode}
    engine = {"serve": measured_settings(recipe), "bench": recipe.bench.settings(), "target": recipe.target.settings()}
    inputs = {
        "prompts": hash_file(args.prompts), "held_out": hash_file(args.held_out),
        "target": Target.here(recipe.target).fingerprint,
    }  # fmt: skip
    data = Run.open(
        job.folder, "end to end: data", recipe_yaml=recipe.to_yaml(), inputs=inputs,
        settings={**shared, **engine, "synth": recipe.synth.settings(), "dump": recipe.dump.settings()},
    )  # fmt: skip
    length = {"budget_s": None if args.steps else args.budget_s, "steps": args.steps, "checkpoints": args.checkpoints}
    settings = {**length, "train": recipe.training().settings(), "export": recipe.export.settings()}
    return data, Run.open(
        job.results, "end to end", settings=settings, inputs={"data": data.fingerprint}, recipe_yaml=recipe.to_yaml()
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--prompts", type=Path, required=True, help="to train on, JSONL with messages")
    parser.add_argument("--held-out", type=Path, required=True, help="prompts to measure on")
    parser.add_argument("--thinking-mode", default="", help="of all replies; default: the chat template's")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="use only the first prompts; default: all")
    parser.add_argument("--held-out-limit", type=int, help="use only the first held-out prompts; default: all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget-s", type=float, default=360.0, help="from the first prompt to the end of training")
    length.add_argument("--steps", type=int, help="instead: steps of both sides")
    parser.add_argument("--checkpoints", type=int, default=4, help="most drafts of a side that are served")
    parser.add_argument("--aim", type=float, default=1.5, help="ratio of the times to equal acceptance, only printed")
    parser.add_argument("--smoke", action="store_true", help="24 prompts, 8 held-out ones, 12 steps, 2 checkpoints")
    args = parser.parse_args(argv)
    if args.smoke:
        args.limit, args.held_out_limit, args.steps, args.checkpoints = 24, 8, 12, 2
    return args


def main() -> None:
    args = parse_args()
    args.output, args.peer_python = args.output.absolute(), args.peer_python.absolute()
    section = load_recipe(args.recipe, args.set).training()
    refuse_untrainable(section, "fixed-exp-decay")
    job = Job(args, args.output / "data", args.output / section.draft.method)
    runs = open_runs(job)
    job.write_prompts()
    measure(job)
    for run in runs:
        run.finish({})


if __name__ == "__main__":
    main()

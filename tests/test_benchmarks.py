"""Claims about `benchmarks/`: those that need nothing but this project run; each refuses sides of unequal work."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, run_here
from safetensors.torch import load_file, save_file
from written import write_conversations

from contracts.acceptance import Acceptance
from contracts.ledger import Ledger
from contracts.store import Store
from recipe.load import load_recipe


def run_benchmark(name: str, *args: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("synth_client", ("--rows", "100"), "ratio"),
        ("preemption", ("--rows", "20000"), "lost rows"),
        ("first_calls", ("--waves", "1"), "with settled functions: 0 of 24"),
    ],
)
def test_a_benchmark_that_needs_nothing_else_runs(name: str, args: tuple[str, ...], told: str) -> None:
    assert told in run_benchmark(name, *args)


def test_the_forms_of_a_store_have_the_tensors_that_dumps_in_these_forms_write(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    forms = load("state_forms")
    conversations = write_conversations(target_folder, tmp_path / "conversations", 3)

    def dump(form: str) -> tuple[list[str], Store]:
        sets, store = ["dump.backend=hf", *forms.settings_of(form)], Store(tmp_path / form)
        words = [word for value in sets for word in ("--set", value)]
        places = ("--conversations", conversations, "--output", store.folder)
        run_here("dump", "run", "--recipe", recipe_path, *words, *places)
        return sets, store

    _, whole = dump("fp32")
    for form in ("fp8", "int4-drop-seen", "bf16-top4"):
        sets, dumped = dump(form)
        written = Store(tmp_path / f"written-{form}")
        forms.write_form(load_recipe(recipe_path, sets), whole, written.folder)
        assert written.read_manifest() == dumped.read_manifest()
        assert len(dumped.sample_ids()) == 3
        for id_, entry in Ledger(dumped.ledger_path).entries.items():
            assert Ledger(written.ledger_path).entries[id_]["size"] == entry["size"]
            found, expected = (load_file(store.sample_path(id_)) for store in (written, dumped))
            assert found.keys() == expected.keys()
            assert all(
                torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected
            )
        told = one_line(partial(forms.write_form, load_recipe(recipe_path, sets), dumped, tmp_path / "again"))
        assert "found states of a reduced form, expected all of them in fp32 or bf16" in told


def test_forms_that_were_predicted_on_other_samples_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = load("state_forms")
    part = Acceptance((2, 3, 5))
    monkeypatch.setattr(forms, "run_form", lambda _, form: (1.0, {"a": part, ("b" if form == "bf16" else "c"): part}))
    places = ("--recipe", "r", "--store", "s", "--held-out", "h", "--work", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["state_forms.py", *places, "--forms", "bf16", "fp8"])
    assert "fp8: found predictions of other samples than those of bf16: use another --work" in one_line(forms.main)
    assert "| bf16 | 1 | 1.000 |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_gpu_check_runs_dry_on_a_cpu_with_little_more_than_torch_and_transformers(tmp_path: Path) -> None:
    missing = ("vllm", "openai", "aiohttp", "datasets", "matplotlib", "tensorboard", "submitit", "ijson", "orjson",
               "pyarrow", "prometheus_client")  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {missing}:\n    sys.modules[name] = None\n")
    args = ("--device", "cpu", "--small", "--output", str(tmp_path / "out"))
    printed = run_benchmark("gpu/check", *args, PYTHONPATH=str(tmp_path))
    report = json.loads((tmp_path / "out/gpu-check.json").read_text())
    assert report["failed"] == []
    assert report["checks"]["losses"]["dflash"]["largest relative difference"] == 0.0
    assert "step        ok" in printed


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


def one_line(run: Callable[[], object]) -> str:
    """The message that a benchmark exits with, which makes its exit code 1."""
    with pytest.raises(SystemExit) as end:
        run()
    assert isinstance(end.value.code, str)
    assert "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([1.0, 4, 24], None),
        ([1.0, 4, 18], "the dump side did other work: found 18 tokens of 4 samples, expected 24 of 4"),
        ([1.0, 3, 24], "found 24 tokens of 3 samples, expected 24 of 4"),
        (None, "the dump side ended with exit code 3"),
    ],
)
def test_a_side_of_dump_prefill_that_skips_tokens_or_ends_is_named(
    result: list[float] | None, told: str | None
) -> None:
    answer = "raise SystemExit(3)" if result is None else f"print('result', {json.dumps(result)!r})"
    side = [sys.executable, "-c", f"input(); {answer}"]
    with subprocess.Popen(side, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask() -> float:
            rate: float = load("dump_prefill").ask("dump", process, 4, 6, 0)
            return rate

        if told is None:
            assert ask() == 24.0
        else:
            assert told in one_line(ask)


def test_a_process_that_computes_no_cosines_is_not_counted_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("first_calls")
    right = [struct.pack("d", 1e-6)] * (module.PROCESSES - 1)
    assert len(module.read_errors([*right, struct.pack("d", 1.0)])) == module.PROCESSES
    for wrong in (b"", struct.pack("d", math.nan)):
        message = one_line(lambda answer=wrong: module.read_errors([*right, answer]))  # type: ignore[misc]
        assert message == "found cosines of 23 processes in a wave, expected 24"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["first_calls.py", "--waves", "1"])
    assert "without MKL" in one_line(module.main)


def test_a_simulation_that_loses_rows_of_preempted_tasks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("preemption")
    args = argparse.Namespace(nodes=4, rows=20_000, in_flight=64, row_s=55.0, start_h=0.25, queue_h=0.1)

    def simulate() -> Any:
        return module.simulate(args, tasks=4, every_h=1.0, warning_h=0.0, slow=0.0)

    assert math.isclose(simulate().rows, 20_000)
    push = module.heapq.heappush

    def lose(heap: list[tuple[float, float]], item: tuple[float, float]) -> None:
        push(heap, (item[0], item[1] * 0.9) if isinstance(item[1], float) else item)  # of a task: rows left

    monkeypatch.setattr(module.heapq, "heappush", lose)
    assert "rows, expected each of the 20000 once" in one_line(simulate)


def test_clients_that_send_other_requests_or_too_few_are_refused() -> None:
    module = load("synth_client")
    with module.serve_at_once() as url:
        module.run_layer("transport", 300, url)
        form = module.take_form(url, "transport", 300)
        assert form["max_tokens"] == module.MAX_TOKENS
        module.run_layer("low-level", 300, url)
        message = one_line(lambda: module.take_form(url, "low-level", 301))
        assert message == "low-level sent 300 requests, expected one for each of 301 rows"
    module.check_forms({"a": form, "b": dict(form)})
    message = one_line(lambda: module.check_forms({"a": form, "b": {**form, "max_tokens": 1}}))
    assert message == "the clients send other requests (max_tokens): a 128, b 1"


def test_servers_answers_of_other_rows_or_tokens_are_refused() -> None:
    check = load("synth_server").check_work
    check([24, 2787], [24, 2790], 24)
    assert "answered 23 rows" in one_line(lambda: check([23, 2787], [24, 2787], 24))
    assert "vllm bench serve 23" in one_line(lambda: check([24, 2787], [23, 2787], 24))
    assert "generated 2787 tokens, vllm bench serve 2700" in one_line(lambda: check([24, 2787], [24, 2700], 24))


def test_a_peer_of_other_steps_or_parameters_is_refused(tmp_path: Path) -> None:
    module = load("served_peer")
    for epoch, steps in enumerate((300, 600, 800, 801)):
        (tmp_path / f"{epoch}").mkdir()
        (tmp_path / f"{epoch}/training_state.json").write_text(json.dumps({"epoch": epoch, "global_step": steps}))
    (tmp_path / "epoch3_end").symlink_to("3")
    found = module.find_checkpoints(tmp_path)
    assert set(found) == {300, 600, 800, 801}
    assert found[800] == tmp_path / "2/model.safetensors"

    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps({"rope_theta": 1e4}))
    (ours / "draftline.json").touch()
    weights = {"fc.weight": torch.zeros(2, 6), "norm.weight": torch.zeros(2)}
    save_file(weights, ours / "model.safetensors")
    for change, told in (
        ({"lm_head.weight": torch.zeros(9, 2)}, None),  # the target's
        ({"fc.weight": torch.zeros(2, 8)}, "(fc.weight): ours (2, 6), theirs (2, 8)"),
        ({"extra.weight": torch.zeros(2)}, "(extra.weight): ours None, theirs (2,)"),
    ):
        save_file({**weights, **change}, tmp_path / "theirs.safetensors")
        export = lambda: module.export_peer(tmp_path / "theirs.safetensors", ours, tmp_path / "export")  # noqa: E731
        if told is None:
            export()
        else:
            assert told in one_line(export)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"steps": 41}, "ours 140 tokens, theirs 141"),
        ({"turns": 3}, "(turns): ours 2, theirs 3"),
        ({"num_draft_tokens": 7}, "(num_draft_tokens): ours 3, theirs 7"),
        ({"walks": [{"turn": "a"}, {"turn": "c"}]}, "other turns"),
    ],
)
def test_drafts_that_were_measured_on_other_replies_are_not_compared(change: dict[str, Any], told: str | None) -> None:
    module = load("served_peer")
    module.MAX_DIFFERENCE = 0.005
    report = {"steps": 40, "accepted": 100, "turns": 2, "num_draft_tokens": 3, "walks": [{"turn": "a"}, {"turn": "b"}]}
    if told is None:
        module.check_replies(report, {**report, "steps": 50, "accepted": 90})  # other acceptance, the same replies
    else:
        assert told in one_line(lambda: module.check_replies(report, {**report, **change}))


def test_an_eagle3_peer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    module = load("served_peer")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps({"rope_theta": 1e4}))
    (ours / "draftline.json").touch()
    name = "self_attn.q_proj.weight"
    own = {"lm_head.weight": torch.zeros(3, 2), "d2t": torch.tensor([0, 4, 4]), "t2d": torch.zeros(9, dtype=torch.bool)}
    save_file({f"midlayer.{name}": torch.zeros(2, 4), **own}, ours / "model.safetensors")
    theirs = {f"layers.0.{name}": torch.ones(2, 4), **own, "embed_tokens.weight": torch.zeros(9, 2)}
    save_file(theirs, tmp_path / "theirs.safetensors")
    module.export_peer(tmp_path / "theirs.safetensors", ours, tmp_path / "export")
    written = load_file(tmp_path / "export/model.safetensors")
    assert set(written) == {f"midlayer.{name}", *own}
    assert written[f"midlayer.{name}"].equal(torch.ones(2, 4))
    save_file({**theirs, "d2t": torch.tensor([0, 4, 5])}, tmp_path / "theirs.safetensors")
    export = lambda: module.export_peer(tmp_path / "theirs.safetensors", ours, tmp_path / "export")  # noqa: E731
    assert "other vocabularies" in one_line(export)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"train.draft.slot_weights": "dpace"}, None),
        ({"train.lr_schedule": "wsd"}, "train.lr_schedule: found wsd, expected cosine or linear"),
        ({"train.max_grad_norm": 0.5}, "found 0.5, expected 1.0"),
        ({"train.max_samples": 5}, "found 5, expected none"),
        ({"train.held_out_fraction": 0.1}, "found 0.1, expected 0"),
        ({"train.draft.objective": "distill"}, "--peer-weights fixed-exp-decay"),
    ],
)
def test_a_recipe_that_the_peer_has_no_option_for_is_refused(
    change: dict[str, Any], told: str | None, recipe_path: Path
) -> None:
    module = load("served_peer")
    section = load_recipe(recipe_path, [f"{key}={value}" for key, value in change.items()]).training()
    if "train.draft.objective" in change:
        module.refuse_untrainable(section, "fixed-exp-decay")
    if told is None:
        module.refuse_untrainable(section, "dpace")
    else:
        assert told in one_line(lambda: module.refuse_untrainable(section, "dpace"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 30}, None),  # a reply of few tokens: drafts may share it out otherwise
        ({"inputs": {"store": "b"}}, "other stores"),
        ({"samples": 2}, "(samples): ours 1, theirs 2"),
        ({"walks": [{"sample": "b", "accepted": [[1]]}]}, "other samples"),
    ],
)
def test_drafts_that_were_predicted_on_other_samples_are_not_compared(change: dict[str, Any], told: str | None) -> None:
    module = load("served_peer")
    walks = [{"sample": "a", "accepted": [[0, 2], [3]]}]
    report: dict[str, Any] = {"steps": 40, "accepted": 9, "acceptance_length": 2.0, "samples": 1, "num_draft_tokens": 3}
    report |= {"walks": walks, "inputs": {"store": "a"}}
    compare = lambda: module.compare(report, {**report, **change}, "peer", "sample")  # noqa: E731
    if told is None:
        compare()
    else:
        assert told in one_line(compare)


CHUNKS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("peer", "benchmarks/speculators_cpu.py")
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)
peer.CHUNK_ELEMENTS = 3 * 50  # three rows, so that the last chunk has one
plain = lambda x, y: -(y.softmax(-1) * x.log_softmax(-1)).sum(-1)
torch.manual_seed(0)
logits, targets = torch.randn(1, 10, 50, requires_grad=True), torch.randn(1, 10, 50)
found = []
for loss in (plain, peer.in_chunks(plain)):
    kept = []
    keep = lambda tensor: kept.append(tensor.untyped_storage().data_ptr()) or tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(logits, targets)
    own = {tensor.untyped_storage().data_ptr() for tensor in (logits, targets)}
    found.append((value.detach(), torch.autograd.grad(value.square().sum(), logits)[0], set(kept) - own))
assert found[0][0].equal(found[1][0]) and found[0][1].equal(found[1][1])
print(len(found[0][2]) > 0, len(found[1][2]))
"""


def test_the_peers_losses_are_the_same_in_chunks_and_keep_no_copies_of_the_logits() -> None:
    command = [sys.executable, "-c", CHUNKS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["True", "0"]


def curve(module: ModuleType, *points: tuple[float, float]) -> Any:
    return [module.Point(number, seconds, length) for number, (seconds, length) in enumerate(points, start=1)]


def make_side(module: ModuleType, *points: tuple[float, float], stages: Any = ()) -> Any:
    return module.Side(stages, curve(module, *points))


def test_the_time_to_equal_acceptance_lies_on_the_line_between_two_checkpoints() -> None:
    module = load("end_to_end_report")
    ours, peer = make_side(module, (100, 2.0), (200, 3.0)), make_side(module, (150, 1.5), (300, 2.25), (400, 2.5))
    found = module.compare_times(ours, peer)
    assert found["acceptance_length"] == 2.5
    assert (found["ours_s"], found["peer_s"]) == (150, 400)
    assert found["ratio"] == pytest.approx(400 / 150)
    assert not found["ours_at_most"]
    assert "ratio 2.67 (aim: 1.5)" in module.explain_times(found, ("ours", "theirs"), 1.5)


def test_a_side_whose_first_checkpoint_is_better_already_gives_a_bound() -> None:
    module = load("end_to_end_report")
    found = module.compare_times(make_side(module, (100, 2.7), (200, 3.0)), make_side(module, (400, 2.5)))
    told = module.explain_times(found, ("ours", "theirs"), 1.5)
    assert "ours at most 100 s, theirs 400 s, ratio at least 4.00" in told
    turned = module.compare_times(make_side(module, (400, 2.5)), make_side(module, (100, 2.7)))
    assert "ratio at most 0.25" in module.explain_times(turned, ("ours", "theirs"), 1.5)


def test_a_curve_that_falls_counts_from_where_it_first_reached_the_level() -> None:
    module = load("end_to_end_report")
    points = curve(module, (10, 1.0), (20, 3.0), (30, 2.0), (40, 3.5))
    assert module.reach(points, 2.5).seconds == pytest.approx(17.5)
    with pytest.raises(ValueError, match=r"reaches an acceptance length of 3\.600"):
        module.reach(points, 3.6)


def test_a_stage_that_one_side_lacks_has_empty_cells_and_the_sum_is_of_each_side() -> None:
    module = load("end_to_end_report")
    stages = [module.Stage("generate", 0.0, 60.0, 2**30, 2**20), module.Stage("prepare", 60.0, 30.0, 2**29, 3 * 2**20)]
    sides = {"ours": make_side(module, (1, 1), stages=stages[:1]), "theirs": make_side(module, (1, 1), stages=stages)}
    assert module.make_stage_table(sides).splitlines()[2:] == [
        "| generate | 60 | 1.00 GiB | 1 MiB | 60 | 1.00 GiB | 1 MiB |",
        "| prepare |  |  |  | 30 | 0.50 GiB | 3 MiB |",
        "| **all** | 60 | 1.00 GiB | 1 MiB | 90 | 1.00 GiB | 3 MiB |",
    ]
    assert module.make_curve_table(sides).splitlines()[-1] == "| theirs | 1 | 1 | 1.000 |"


def test_pilots_tell_how_many_steps_fit_and_a_disturbed_machine_is_refused() -> None:
    module = load("end_to_end_report")
    assert module.fit_steps(130.0, [(60, 40.0), (10, 15.0)]) == 240  # half a second a step
    with pytest.raises(ValueError, match="room for 40 steps"):
        module.fit_steps(30.0, [(10, 15.0), (60, 40.0)])
    with pytest.raises(ValueError, match="other work"):
        module.fit_steps(300.0, [(10, 40.0), (60, 40.0)])
    assert module.spread([1, 2, 3, 4, 5, 6, 7, 8], 4) == [2, 4, 6, 8]
    assert module.spread([3, 6, 7], 4) == [3, 6, 7]


def test_a_stage_is_measured_once_and_an_interrupted_one_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    stages, output = load("stage_meter").Stages(tmp_path, "ours"), tmp_path / "output"
    output.mkdir()
    (output / "half").touch()  # of a process that was killed
    code = "import sys, time; block = bytearray(2 ** 28); time.sleep(1); open(sys.argv[1], 'wb').write(block[:2 ** 20])"

    def work() -> None:
        assert not output.exists()
        stages.call("first", [sys.executable, "-c", code, tmp_path / "states"])

    first = stages.run("first", [output], work)
    assert first.memory >= 2**28
    assert first.disk >= 2**20
    assert stages.run("first", [output], lambda: pytest.fail("it ran twice")) == first
    fail = lambda: stages.call("second", [sys.executable, "-c", "raise SystemExit('no room')"])  # noqa: E731
    assert "exit code 1" in one_line(fail)

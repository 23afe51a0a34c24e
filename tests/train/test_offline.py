"""Claims about training: killed and resumed equals uninterrupted, bit for bit; wrong stores are refused."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, kill_when, read_lines, run, run_here
from safetensors.torch import load_file
from written import write_store

import train.log
from common.errors import UserError
from contracts.draft import DraftRun
from contracts.speeds import Speed, Speeds
from contracts.store import Store
from recipe.load import load_recipe
from recipe.mask import mask_token_of
from recipe.train import TrainSection
from serve.command import fingerprint_draft
from target.target import Target
from train.data import Samples
from train.schedule import learning_rate


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["--recipe", recipe_path, "--store", store, "--set", "train.num_steps=60"]
    run("train", "offline", *args, "--output", tmp_path / "whole")
    killed = DraftRun(tmp_path / "killed")
    kills = 0
    for step in (4, 28):
        kills += kill_when(
            lambda step=step: bool(killed.steps()) and killed.steps()[-1] >= step,
            "train", "offline", *args, "--output", killed.folder,
        ) == -9  # fmt: skip
    assert kills >= 1
    result = run("train", "offline", *args, "--output", killed.folder)
    assert "going on from step" in result.stdout
    whole = DraftRun(tmp_path / "whole")
    expected, found = load_file(whole.chosen_weights()), load_file(killed.chosen_weights())
    assert whole.chosen_weights().parent.name == killed.chosen_weights().parent.name == "step-000060"
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert learned(killed) == learned(whole)
    assert [line["step"] for line in read_lines(killed.metrics_path)] == [10, 20, 30, 40, 50, 60]
    assert "is finished, skipped" in run("train", "offline", *args, "--output", killed.folder).stdout
    state = json.loads((killed.folder / "run.json").read_text())
    (killed.folder / "run.json").write_text(json.dumps({**state, "complete": False}))  # killed after its last step
    run("train", "offline", *args, "--output", killed.folder)
    assert json.loads((killed.folder / "run.json").read_text())["summary"] == state["summary"]


def learned(run_: DraftRun) -> list[dict[str, object]]:
    """The metrics without what the clock had to do with."""
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")}
        for line in read_lines(run_.metrics_path)
    ]


def test_sigterm_saves_first_and_the_run_goes_on_from_there(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft"]
    args += ["--set", "train.num_steps=3000", "--set", "train.checkpoint_every=3000"]
    process = subprocess.Popen(command(*args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    while len(read_lines(tmp_path / "draft/metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (step,) = DraftRun(tmp_path / "draft").steps()
    assert f"stopped by SIGTERM after step {step}, which is saved" in errors
    assert step >= 20
    more = ["--set", "train.checkpoint_every=1500"]  # how often is saved may change
    again = subprocess.Popen(command(*args, *more), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    while len(read_lines(tmp_path / "draft/metrics.jsonl")) < step // 10 + 2:
        assert again.poll() is None
        time.sleep(0.01)
    again.kill()
    assert again.stdout is not None
    assert f"going on from step {step}" in again.stdout.read()


def test_a_part_is_held_out_by_conversation_and_the_best_checkpoint_is_kept(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder), num_samples=20)
    args = ["--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft"]
    sets = ["held_out_fraction=0.3", "evaluate_every=10", "num_steps=40", "keep_checkpoints=1"]
    printed = run_here("train", "offline", *args, *(word for s in sets for word in ("--set", f"train.{s}"))).stdout
    assert "predicted acceptance length" in printed
    draft = DraftRun(tmp_path / "draft")
    summary = json.loads((draft.folder / "run.json").read_text())["summary"]
    assert 0 < summary["held_out"] < 20
    assert summary["held_out"] + summary["samples"] == 20
    lengths = {
        line["step"]: line["held_out_acceptance"] for line in read_lines(draft.metrics_path) if "loss" not in line
    }
    assert list(lengths) == [10, 20, 30, 40]
    best = draft.best_step()
    assert best is not None
    assert lengths[best] == max(lengths.values())
    assert draft.chosen_weights().parent == draft.step_folder(best)
    assert set(draft.steps()) == {best, 40}
    assert (draft.folder / "curves.png").stat().st_size > 10_000
    assert list((draft.folder / "tensorboard").iterdir())


@pytest.mark.parametrize(("every_s", "pictures"), [(0.0, 4), (3600.0, 1)])
def test_curves_are_drawn_at_the_end_and_else_only_when_the_last_picture_is_old(
    recipe_path: Path,
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every_s: float,
    pictures: int,
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(train.log, "DRAW_EVERY_S", every_s)
    monkeypatch.setattr(train.log, "draw_curves", lambda metrics, output: drawn.append(output))
    store = write_store(tmp_path / "store", Target.read(target_folder))
    sets = ["--set", "train.num_steps=4", "--set", "train.checkpoint_every=1"]
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft", *sets)
    assert drawn == [tmp_path / "draft/curves.png"] * pictures


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_follow_the_loss_of_one(
    recipe_path: Path, target_folder: Path, tmp_path: Path, parallel: str
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["offline", "--recipe", recipe_path, "--store", store, "--set", "train.num_steps=50"]
    sets = (
        "num_threads=1", f"parallel={parallel}", "global_batch_size=8", "gradient_accumulation_steps=2",
        "held_out_fraction=0.3", "evaluate_every=25",
    )  # fmt: skip
    args += [word for one in sets for word in ("--set", f"train.{one}")]
    run("train", *args, "--output", tmp_path / "one")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "--module", "train.cli"]
    run(*torchrun, *args, "--output", tmp_path / "two")
    one, two = (learned(DraftRun(tmp_path / name)) for name in ("one", "two"))
    assert [line["step"] for line in two if "loss" in line] == [10, 20, 30, 40, 50]
    assert [line["step"] for line in two if "held_out_acceptance" in line] == [25, 50]
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) / a["loss"] < 1e-4, (a, b)  # type: ignore[operator]
            assert a["accuracy"] == b["accuracy"]
        else:  # the processes share out the conversations
            assert a["held_out_acceptance"] == pytest.approx(b["held_out_acceptance"], abs=0.02)
    weights = [load_file(DraftRun(tmp_path / name).chosen_weights()) for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(recipe_path: Path, target_folder: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    sets = (
        "num_steps=30", "checkpoint_every=10", "keep_checkpoints=9", "num_threads=1", "parallel=fsdp2",
        "global_batch_size=8", "optimizer=muon",  # with AdamW for the norms, so both are sharded anew
    )  # fmt: skip
    args = ["offline", "--recipe", recipe_path, "--store", store, *(w for s in sets for w in ("--set", f"train.{s}"))]
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "--module", "train.cli"]
    run("train", *args, "--output", tmp_path / "one")
    folder = tmp_path / "turns"
    for step, command_ in ((10, ["train"]), (20, torchrun), (30, ["train"])):
        run(*command_, *args, "--output", folder)
        for later in [later for later in DraftRun(folder).steps() if later > step]:
            shutil.rmtree(DraftRun(folder).step_folder(later))  # as if it had been killed here
        state = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**state, "complete": step == 30}))
        assert DraftRun(folder).steps()[-1] == step
    one, turns = (learned(DraftRun(path)) for path in (tmp_path / "one", folder))
    assert [line["step"] for line in turns] == [10, 20, 30]
    for a, b in zip(one, turns, strict=True):
        assert abs(a["loss"] - b["loss"]) / a["loss"] < 1e-4, (a, b)  # type: ignore[operator]


@pytest.mark.parametrize(
    "changes", [["objective=distill"], ["slot_weights=dpace"], ["objective=distill", "slot_weights=dpace"]]
)
def test_every_objective_learns(recipe_path: Path, target_folder: Path, tmp_path: Path, changes: list[str]) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    sets = [word for change in changes for word in ("--set", f"train.draft.{change}")]
    sets += ["--set", "train.num_steps=60"]
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft", *sets)
    losses = [line["loss"] for line in read_lines(tmp_path / "draft/metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_products_in_bf16_follow_the_loss_of_fp32_and_the_weights_stay_in_fp32(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["--recipe", recipe_path, "--store", store, "--set", "train.num_steps=30"]
    args += ["--set", "train.draft.objective=distill"]
    for name in ("false", "true"):
        run_here("train", "offline", *args, "--set", f"train.bf16={name}", "--output", tmp_path / name)
    fp32, bf16 = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("false", "true"))
    for a, b in zip(fp32, bf16, strict=True):
        assert a["loss"] != b["loss"]
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
    weights = load_file(DraftRun(tmp_path / "true").chosen_weights())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_schedules_start_with_the_warm_up_and_end_near_zero() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        draft = {"method": "dflash", "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1}
        section = TrainSection.model_validate(
            {"draft": draft, "num_steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "lr_schedule": schedule}
        )
        rates = [learning_rate(section, step) for step in range(100)]
        assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert rates[99] < 0.06
        assert all(b <= a for a, b in itertools.pairwise(rates[10:]))
        assert (rates[79] == 1.0) == (schedule == "wsd")


def test_a_mask_token_in_a_sample_that_only_the_last_step_takes_is_refused_before_the_first(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    target = Target.read(target_folder)
    store = Store(write_store(tmp_path / "store", target))
    recipe = load_recipe(recipe_path, ["train.global_batch_size=1", "train.num_steps=10"])
    samples = Samples(store, recipe.training(), 256)
    last = samples.batch(9).sample_ids[0]
    assert all(last not in samples.batch(step).sample_ids for step in range(9))
    sample = store.read_sample(last)
    mask_token = mask_token_of(recipe, target)
    assert mask_token is not None
    sample.input_ids[20] = mask_token
    store.write_sample(last, sample)
    args = ["train", "offline", "--recipe", recipe_path, "--store", store.folder, "--output", tmp_path / "draft"]
    sets = ["--set", "train.global_batch_size=1", "--set", "train.num_steps=10", "--set", "train.checkpoint_every=1"]
    result = run_here(*args, *sets, check=False)
    assert result.returncode == 2
    assert f"{last}.safetensors: found the mask token" in result.stderr
    assert not list((tmp_path / "draft").glob("step-*"))
    few = store.sample_ids().index(last)
    assert few
    run_here(*args[:-1], tmp_path / "few", *sets, "--set", f"train.max_samples={few}")


def test_a_store_of_another_target_is_refused_in_one_line(
    recipe_path: Path, other_target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(other_target_folder))
    args = ["--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft"]
    result = run_here("train", "offline", *args, check=False)
    assert result.returncode == 2
    assert "found states of target" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_changed_recipe_is_refused_for_a_run_that_was_begun(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft"]
    run_here("train", "offline", *args)
    result = run_here("train", "offline", *args, "--set", "train.learning_rate=0.5", check=False)
    assert result.returncode == 2
    assert "(settings.train.learning_rate): found 0.5, expected 0.0012" in result.stderr


def test_an_export_holds_what_vllm_reads_and_neither_embedding_nor_head(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    target = Target.read(target_folder)
    store = write_store(tmp_path / "store", target)
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft")
    export = ["train", "export", "--recipe", recipe_path, "--run", tmp_path / "draft", "--output", tmp_path / "export"]
    run_here(*export)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["block_size"] == 4
    mask_token = mask_token_of(load_recipe(recipe_path), target)
    assert config["dflash_config"] == {"mask_token_id": mask_token, "target_layer_ids": [1, 2]}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
    assert config["rope_parameters"] == config["rope_scaling"] == yarn
    assert config["max_position_embeddings"] == 256
    names = set(load_file(tmp_path / "export/model.safetensors"))
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.0.self_attn.q_norm.weight"} <= names
    assert not any("embed" in name or "lm_head" in name or "rope" in name for name in names)
    assert "is finished, skipped" in run_here(*export).stdout
    assert "Not evaluated" in (tmp_path / "export/README.md").read_text()
    evaluation = tmp_path / "eval.json"
    args = ["--recipe", recipe_path, "--run", tmp_path / "draft", "--store", store]
    run_here("train", "eval", *args, "--output", evaluation)
    run_here(*export[:-1], tmp_path / "evaluated", "--eval", evaluation)
    card = (tmp_path / "evaluated/README.md").read_text()
    assert f"| 3 | {json.loads(evaluation.read_text())['acceptance_length']:.3f} [" in card
    assert json.loads((tmp_path / "export/draftline.json").read_text())["sha256"] in card
    assert "Not served: give `train export --served`" in card


def test_the_card_gets_the_speeds_of_its_own_draft_and_keeps_them(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    run_here("train", "offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft")
    export = ["train", "export", "--recipe", recipe_path, "--run", tmp_path / "draft", "--output", tmp_path / "export"]
    run_here(*export)
    shared = {"acceptance_length": 1.2, "step_ms": 10.0}
    speeds = [
        Speed(draft_tokens=0, measured=True, tokens_per_s=121.0, speed_up=1.0, interval=(1.0, 1.0), **shared),
        Speed(draft_tokens=3, measured=True, tokens_per_s=50.0, speed_up=0.41, interval=(0.4, 0.42), **shared),
    ]
    at = Speeds(concurrency=8, conversations=9, recommended=0, speeds=speeds)
    greedy = {"greedy_identical": 9, "greedy_total": 9, "differing": [], "by_set": []}
    report = {**greedy, "speeds": [at.model_dump(mode="json")]}
    for name, draft in (
        ("bench", fingerprint_draft(load_recipe(recipe_path), tmp_path / "export")),
        ("other", "f" * 64),
    ):
        inputs = {"draft": draft, "target": Target.read(target_folder).fingerprint}
        state = {"stage": "bench acceptance", "complete": True, "settings": {}, "inputs": inputs}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(state))
        (tmp_path / name / "acceptance.json").write_text(json.dumps(report))
    result = run_here(*export, "--served", tmp_path / "other", check=False)
    assert result.returncode == 2
    assert "found figures of another draft" in result.stderr
    assert "certificate and card ->" in run_here(*export, "--served", tmp_path / "bench").stdout
    card = (tmp_path / "export/README.md").read_text()
    assert "| 8 | 121.0 | 50.0 | no draft |  |" in card
    assert (
        "With K = 3 this draft slows the target down at concurrency 8: 50.0 against 121.0 tokens/s "
        "(speed-up 0.40 to 0.42). Serve the target without a draft." in card
    )
    assert "is finished, skipped" in run_here(*export).stdout  # without --served it stays
    assert "is finished, skipped" in run_here(*export, "--served", tmp_path / "bench").stdout
    assert (tmp_path / "export/README.md").read_text() == card
    run_here(*export[:-1], tmp_path / "anew", "--served", tmp_path / "bench")
    assert (tmp_path / "anew/README.md").read_text() == card


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["--set", "export.yarn=null"], "yarn_factor"),
        (
            [
                "--set",
                "export.yarn.original_max_position_embeddings=256",
                "--set",
                "export.max_position_embeddings=512",
            ],
            "max_position_embeddings",
        ),
        (["--eval"], "evaluation"),
    ],
)
def test_an_export_with_other_settings_is_not_skipped(
    recipe_path: Path, target_folder: Path, tmp_path: Path, change: list[str], key: str
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["--recipe", recipe_path, "--run", tmp_path / "draft"]
    plain = ["--set", "train.yarn=false"]
    run_here("train", "offline", *args[:2], *plain, "--store", store, "--output", tmp_path / "draft")
    run_here("train", "export", *args, *plain, "--output", tmp_path / "export")
    if change == ["--eval"]:
        run_here("train", "eval", *args, *plain, "--store", store, "--output", tmp_path / "eval.json")
        change = ["--eval", str(tmp_path / "eval.json")]
    result = run_here("train", "export", *args, *plain, *change, "--output", tmp_path / "export", check=False)
    assert result.returncode == 2
    assert f"found an export with {key} " in result.stderr
    assert "is finished, skipped" in run_here("train", "export", *args, *plain, "--output", tmp_path / "export").stdout


@pytest.mark.timeout(120)
def test_the_first_process_decides_for_all_whether_a_checkpoint_is_the_best(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    sets = ("num_threads=1", "num_steps=3", "evaluate_every=1", "held_out_fraction=0.4", "checkpoint_every=100")
    args = ["offline", "--recipe", recipe_path, *(word for one in sets for word in ("--set", f"train.{one}"))]
    script = Path(__file__).with_name("ranks_disagree.py")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", script]
    run(*torchrun, *args, "--store", store, "--output", tmp_path / "draft")
    assert DraftRun(tmp_path / "draft").best_step() == 3


@pytest.mark.long  # half a minute of C++ compilers
@pytest.mark.timeout(600)
def test_a_compiled_draft_learns_the_same(recipe_path: Path, target_folder: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    losses = []
    for compiled in ("true", "false"):
        args = ["--recipe", recipe_path, "--set", f"train.compile={compiled}", "--set", "train.num_steps=4"]
        run("train", "offline", *args, "--store", store, "--output", tmp_path / compiled)
        losses.append(read_lines(tmp_path / compiled / "metrics.jsonl")[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_samples_of_which_a_cut_leaves_nothing_are_left_out_and_counted(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = Store(write_store(tmp_path, Target.read(target_folder)))
    section = load_recipe(recipe_path).training()
    short = store.sample_ids()[0]
    sample = store.read_sample(short)
    sample.loss_mask[:] = False
    sample.loss_mask[2:5] = True
    store.write_sample(short, sample)
    samples = Samples(store, section, 11)  # the others' first span begins at 10
    assert samples.ids == [short]
    assert len(samples.cut_away) == 9
    assert samples.read(short).num_tokens == 11
    with pytest.raises(UserError, match=r"no sample \(10 have nothing to draft within 3 tokens\)"):
        Samples(store, section, 3)


def test_a_yarn_window_that_is_not_the_context_length_is_refused_before_training(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    yarn = ["--recipe", recipe_path, "--set", "export.yarn.factor=3"]
    result = run_here("train", "offline", *yarn, "--store", store, "--output", tmp_path / "draft", check=False)
    assert result.returncode == 2
    assert not (tmp_path / "draft").exists()
    assert (
        "found 128 x 3 = 384 positions, expected export.max_position_embeddings (default: target.max_model_len) = 256"
        in result.stderr
    )

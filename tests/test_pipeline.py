"""Claims about the whole pipeline, on real vLLM: run.sh of the tiny recipe as it ships, its target trained briefly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy_task import write_task
from conftest import ROOT, kill_when, read_lines, run, run_here
from tiny_pipeline import RECIPE, overrides, run_script
from transformers import AutoTokenizer

from contracts.conversation import read_conversations
from contracts.store import Store
from dump.hf import load_model
from dump.predictions import logit_gaps, sampling_of
from recipe.load import load_recipe
from target.head import read_head
from target.target import Target

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

NUM_TRAIN, NUM_HELD_OUT = 60, 12


@pytest.fixture(scope="module")
def report(pipeline: Path) -> dict[str, Any]:
    return dict(json.loads((pipeline / "report.json").read_text()))


def test_the_report_accounts_for_every_row(report: dict[str, Any]) -> None:
    assert report["prompts"] == {"train": NUM_TRAIN, "held_out": NUM_HELD_OUT}
    synth = report["synth"]
    assert sum(synth[key] for key in ("done", "truncated", "filtered", "failed")) == NUM_TRAIN + NUM_HELD_OUT
    assert synth["failed"] == synth["filtered"] == 0
    assert report["dump"]["samples"] >= synth["done"]
    assert report["train"]["steps"] == 80
    assert set(report["seconds"]) == {"target", "synth", "dump", "train", "serve"}
    assert all(value > 0 for value in report["seconds"].values())


def test_the_draft_helps_and_is_served_as_well_as_predicted(report: dict[str, Any]) -> None:
    assert report["served"]["acceptance_length"] > 1.5
    assert abs(report["agreement"]["relative_difference"]) <= 0.01
    # Step by step; rounding may break a tie of two draft logits the other way once.
    assert report["agreement"]["identical_walks"] >= report["agreement"]["walks"] - 1 > 0
    assert set(report["served"]["by_mode"]) == set(report["eval"]["by_mode"])


def test_greedy_output_with_the_draft_is_the_output_without_it(report: dict[str, Any]) -> None:
    assert report["served"]["greedy_identical"] == report["served"]["greedy_total"] > 0


@pytest.mark.long
def test_synthesis_with_the_draft_writes_the_same_conversations(pipeline: Path, tmp_path: Path) -> None:
    args = ["--recipe", RECIPE, *overrides(pipeline), "--prompts", pipeline / "prompts/held_out.jsonl"]
    args += ["--thinking-modes", "enabled,disabled,adaptive", "--output", tmp_path / "synth"]
    printed = run("synth", "generate", *args, "--set", f"synth.draft={pipeline / 'export'}").stdout
    assert f"synth: drafts with {pipeline / 'export'}, 7 tokens a step" in printed
    assert "SpeculativeConfig(method=" in (tmp_path / "synth/server.log").read_text()
    records = [
        sorted(read_lines(folder / "conversations.jsonl"), key=lambda record: record["id"])
        for folder in (tmp_path / "synth", pipeline / "synth/held_out")
    ]
    assert records[0] == records[1] != []
    found, expected = (
        json.loads((folder / "run.json").read_text())["summary"]
        for folder in (tmp_path / "synth", pipeline / "synth/held_out")
    )
    assert found == expected


def test_the_speeds_at_one_and_seven_draft_tokens_predict_those_between_and_are_on_the_card(
    report: dict[str, Any], pipeline: Path
) -> None:
    served = report["served"]
    assert set(served["by_draft_tokens"]) == {"1", "7"}
    # The rates at K = 7 give the rate at K = 1 but for the tokens that its steps begin at.
    assert abs(served["by_draft_tokens"]["1"]["per_position"][0] - served["per_position"][0]) < 0.2
    for at in served["speeds"]:
        assert [speed["draft_tokens"] for speed in at["speeds"]] == list(range(8))
        assert [speed["draft_tokens"] for speed in at["speeds"] if speed["measured"]] == [0, 1, 7]
        lengths = [speed["acceptance_length"] for speed in at["speeds"]]
        assert lengths == sorted(lengths)
        for speed, measured in ((at["speeds"][0], "baseline_tokens_per_s"), (at["speeds"][7], "tokens_per_s")):
            assert speed["tokens_per_s"] == pytest.approx(served[measured][str(at["concurrency"])], abs=0.1)
    table = (pipeline / "bench/acceptance.md").read_text()
    assert table.splitlines()[2] in (pipeline / "export/README.md").read_text()
    assert all(warning in table for warning in served["warnings"])


def test_other_draft_tokens_in_the_same_folder_measure_only_what_is_missing(pipeline: Path, tmp_path: Path) -> None:
    output = shutil.copytree(pipeline / "bench", tmp_path / "bench")
    args = ["bench", "acceptance", "--recipe", RECIPE, *overrides(pipeline), "--output", output]
    args += ["--conversations", pipeline / "synth/held_out", "--draft", pipeline / "export"]
    printed = run_here(*args, "--draft-tokens", "7").stdout
    assert "draft-k7.json is there already" in printed
    assert "Smaller K are not predicted" in printed
    assert set(json.loads((output / "acceptance.json").read_text())["by_draft_tokens"]) == {"7"}
    assert "draft-k1.json is there already" in run_here(*args).stdout
    assert (output / "acceptance.md").read_text() == (pipeline / "bench/acceptance.md").read_text()
    assert "is finished, skipped" in run_here(*args).stdout
    refused = run_here(*args, "--draft-tokens", "8", check=False)
    assert refused.returncode == 2
    assert "from 1 to 7" in refused.stderr
    refused = run_here(*args, "--endpoint", "http://localhost:1/v1", check=False)
    assert refused.returncode == 2
    assert "need --prompts" in refused.stderr


def test_the_plot_is_there(pipeline: Path) -> None:
    assert (pipeline / "acceptance_by_position.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_second_run_skips_everything_and_says_so(pipeline: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pipeline.rglob("*.safetensors")}
    printed = run_script(pipeline)
    # target; synth, dump twice each; verify; train; eval; export twice; bench
    assert printed.count("skipped") == 11
    assert {path: path.stat().st_mtime_ns for path in pipeline.rglob("*.safetensors")} == before


def test_prompt_ids_are_the_template_in_the_rows_own_mode_and_replies_are_its_text(pipeline: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "target")
    modes = set()
    for record in read_conversations(pipeline / "synth/train"):
        modes.add(record.thinking_mode)
        first_reply = next(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        rendered = tokenizer.apply_chat_template(
            record.messages[:first_reply],
            thinking_mode=record.thinking_mode,
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        sample = record.samples[0]
        start, end = sample.loss_spans[0]
        assert sample.token_ids[:start] == rendered
        reply = record.messages[first_reply]
        thought = reply.get("reasoning_content")
        text = tokenizer.decode(sample.token_ids[start:end]).removesuffix("[e~[")
        if record.thinking_mode == "adaptive":
            text = text.removeprefix("<mm:think>" if thought else "</mm:think>")
        assert text == (f"{thought}</mm:think>" if thought else "") + reply["content"]
    assert modes == {"enabled", "disabled", "adaptive"}


def test_generated_tokens_are_supervised_to_the_stop_token_and_nothing_else(pipeline: Path) -> None:
    store, stop = Store(pipeline / "store/train"), Target.read(pipeline / "target").config["eos_token_id"]
    by_id = {record.id: record for record in read_conversations(pipeline / "synth/train")}
    for sample_id in store.sample_ids():
        sample = store.read_sample(sample_id)
        conversation_id, number = sample_id.split("-")
        recorded = by_id[conversation_id].samples[int(number)]
        assert sample.input_ids.tolist() == recorded.token_ids
        assert int(sample.loss_mask.sum()) == sum(end - start for start, end in recorded.loss_spans)
        for _, end in recorded.loss_spans:
            assert sample.input_ids[end - 1] == stop


def test_states_equal_a_transformers_forward_and_predict_the_generated_tokens(pipeline: Path) -> None:
    store = Store(pipeline / "store/train")
    manifest = store.read_manifest()
    model = load_model(Target.read(pipeline / "target"), torch.float32).eval()
    final: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: final.append(args[0][0]))
    head = read_head(Target.read(pipeline / "target"))
    for sample_id in store.sample_ids()[:5]:
        sample = store.read_sample(sample_id)
        with torch.no_grad():
            layers = model(sample.input_ids.long()[None], output_hidden_states=True).hidden_states
        expected = torch.cat([layers[i + 1][0] for i in manifest.layer_ids], dim=-1)
        torch.testing.assert_close(sample.aux_hidden_states, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.hidden_states, final.pop(), rtol=1e-4, atol=1e-4)
        assert float(logit_gaps(head, sample, sampling_of(sample) or {})[0].max()) < 1e-3


def test_a_store_with_a_shifted_layer_or_a_flipped_byte_does_not_verify(pipeline: Path, tmp_path: Path) -> None:
    args = ["--recipe", RECIPE, *overrides(pipeline)]
    flipped = shutil.copytree(pipeline / "store/train", tmp_path / "flipped")
    assert (flipped / "verified.json").exists()  # an earlier proof does not hide damage since
    path = sorted(flipped.glob("samples/*/*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    result = run_here("dump", "verify", *args, "--store", flipped, check=False)
    assert result.returncode == 2
    assert f"{path}: found" in result.stderr

    shifted = shutil.copytree(pipeline / "store/held_out", tmp_path / "shifted")
    store = Store(shifted)
    entries = read_lines(store.ledger_path)
    first = next(entry for entry in entries if entry["status"] == "done")
    sample = store.read_sample(first["id"])
    sample.hidden_states = sample.aux_hidden_states[:, -sample.hidden_states.shape[1] :]
    first.update(store.write_sample(first["id"], sample))
    store.ledger_path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    result = run_here("dump", "verify", *args, "--store", shifted, check=False)
    assert result.returncode == 1
    assert "that its states do not predict" in result.stderr


@pytest.mark.long
def test_a_killed_dump_resumes_without_loss(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    args = ["dump", "run", "--recipe", RECIPE, *overrides(pipeline), "--set", "dump.writers=1"]
    args += ["--conversations", pipeline / "synth/train", "--output", output]
    kills = 0
    for count in (1, 25):
        kills += kill_when(lambda count=count: len(read_lines(output / "ledger.jsonl")) >= count, *args) == -9
    assert kills == 2
    run(*args)
    whole, killed = Store(pipeline / "store/train"), Store(output)
    assert killed.sample_ids() == whole.sample_ids()
    lines = read_lines(killed.ledger_path)
    assert len(lines) == len({line["id"] for line in lines}) == len(read_lines(whole.ledger_path))
    assert len(list(output.rglob("*.safetensors*"))) == len(killed.sample_ids())
    assert not list(output.glob("staging*"))
    for line in lines:
        if line["status"] == "done":
            killed.check_file(line["id"], line)
            a, b = killed.read_sample(line["id"]), whole.read_sample(line["id"])
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.loss_mask, b.loss_mask)
            torch.testing.assert_close(a.aux_hidden_states, b.aux_hidden_states, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def accuracy(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """`bench accuracy` at a plan's one evaluated point, and its output.

    The questions are those that the target answered before; every fourth has another answer as the right one.
    """
    rows = []
    records = [*read_conversations(pipeline / "synth/train"), *read_conversations(pipeline / "synth/held_out")]
    for record in records:
        if record.thinking_mode == "disabled" and record.finish_reason == "stop" and len(record.messages) == 3:
            system, question, reply = (message["content"] for message in record.messages)
            answer = reply if len(rows) % 4 else "another answer"
            rows.append({"system": system, "question": question, "answer": answer})
    made = tmp_path_factory.mktemp("evaluated")
    folder, output = write_task(made / "tasks", "explain", rows), made / "accuracy"
    keys = {"thinking_mode": "disabled", "repeats": 2, "temperature": 0.3}
    words = [word for key, value in keys.items() for word in ("--set", f"bench.accuracy.{key}={value}")]
    space = "[{isl: 8192, osl: 1024, search_space: [{conc_start: 8, conc_end: 16}]}]"
    words += ["--set", f"bench.sweep.scenarios={space}"]
    args = ["bench", "accuracy", "--recipe", RECIPE, *overrides(pipeline), *words, "--draft", pipeline / "export"]
    args += ["--tasks", "explain", "--include-path", folder]
    run(*args, "--output", output)
    return args, output


@pytest.mark.long
def test_answers_to_an_evaluation_are_as_right_with_the_draft_as_without(accuracy: tuple[list[object], Path]) -> None:
    report = json.loads((accuracy[1] / "accuracy.json").read_text())
    rows = {(row["answers"], row["metric"]): row for row in report["rows"]}
    greedy, sampled = rows["greedy", "exact_match,none"], rows["sampled", "same_name,none"]
    share_wrong = len(range(0, greedy["questions"], 4)) / greedy["questions"]
    assert greedy["base"] == greedy["draft"] == pytest.approx(1 - share_wrong)
    assert greedy["difference"] == greedy["by_chance"] == 0.0
    of_greedy, of_sampled = report["replies"]
    assert of_greedy["identical"] == of_greedy["replies"] == greedy["questions"] >= report["min_questions"]
    assert of_greedy["acceptance_length"] > 1.5
    assert (sampled["repeats"], of_sampled["replies"]) == (2, 2 * greedy["questions"])
    assert of_sampled["identical"] < of_sampled["replies"]  # drawn anew
    assert 0 < sampled["base"] < 1 - share_wrong
    assert abs(sampled["difference"]) <= sampled["by_chance"] > 0
    passes = {path.name: json.loads(path.read_text()) for path in (accuracy[1] / "answers/8k1k-tp1-c16-base").iterdir()}
    one, other = ([q["replies"] for q in passes[f"explain-sampled{n}.json"]["tasks"]["explain"]] for n in (0, 1))
    assert one != other
    assert (accuracy[1] / "accuracy.md").read_text().count("| 8k1k-tp1-c16 | explain |") == 6


@pytest.mark.long
def test_a_finished_evaluation_is_not_asked_again_and_another_setting_is_refused_by_name(
    accuracy: tuple[list[object], Path],
) -> None:
    args, output = accuracy
    before = {path: path.stat().st_mtime_ns for path in (output / "answers").rglob("*.json")}
    run(*args, "--output", output)
    assert {path: path.stat().st_mtime_ns for path in (output / "answers").rglob("*.json")} == before
    refused = run(*args, "--output", output, "--limit", 3, check=False)
    assert refused.returncode == 2
    assert f"{output} (settings.limit): found 3, expected None as when this output was begun" in refused.stderr


@pytest.mark.long
def test_a_draft_that_changes_the_answers_fails_with_task_and_size_and_the_other_side_is_kept(
    accuracy: tuple[list[object], Path], tmp_path: Path
) -> None:
    output = shutil.copytree(accuracy[1], tmp_path / "out")
    shutil.rmtree(output / "answers/8k1k-tp1-c16-draft")
    (output / "servers/8k1k-tp1-base.log").unlink()
    env = {"PYTHONPATH": ROOT / "tests/seeded_defects", "SEEDED_DEFECT": "lossy draft"}
    words = [word for key, value in env.items() for word in ("--set", f"serve.env.{key}={value}")]
    failed = run(*accuracy[0], *words, "--set", "bench.accuracy.repeats=0", "--output", output, check=False)
    assert failed.returncode == 1
    assert not (output / "servers/8k1k-tp1-base.log").exists()
    row = json.loads((output / "accuracy.json").read_text())["rows"][0]
    assert row["difference"] < -0.3
    assert "error: 8k1k-tp1-c16, task explain, exact_match,none, greedy answers: found " in failed.stderr
    assert (
        f"a difference of {row['difference']:+.4f} over {row['questions']} questions, expected at most" in failed.stderr
    )


@pytest.mark.long
def test_a_killed_synthesis_with_its_own_server_resumes_without_loss(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "synth"
    args = ["synth", "generate", "--recipe", RECIPE, *overrides(pipeline), "--set", "synth.concurrency=4"]
    args += ["--prompts", pipeline / "prompts/train.jsonl", "--output", output]
    assert kill_when(lambda: len(read_lines(output / "ledger.jsonl")) >= 10, *args) == -9
    run(*args)
    whole, killed = read_lines(pipeline / "synth/train/conversations.jsonl"), read_lines(output / "conversations.jsonl")
    assert len(killed) == NUM_TRAIN
    by_index = {row["index"]: row for row in killed}
    assert sorted(by_index) == list(range(NUM_TRAIN))
    assert all(by_index[row["index"]]["id"] == row["id"] for row in whole)


@pytest.mark.long
def test_a_killed_benchmark_keeps_the_server_that_was_finished(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench"
    args = ["bench", "acceptance", "--recipe", RECIPE, *overrides(pipeline)]
    args += ["--conversations", pipeline / "synth/held_out", "--draft", pipeline / "export", "--output", output]
    args += ["--draft-tokens", "7"]
    assert kill_when((output / "baseline.json").exists, *args) == -9
    finished = (output / "baseline.json").stat().st_mtime_ns
    assert "baseline.json is there already" in run(*args).stdout
    assert (output / "baseline.json").stat().st_mtime_ns == finished
    again = json.loads((output / "acceptance.json").read_text())
    before = json.loads((pipeline / "bench/acceptance.json").read_text())
    assert again["acceptance_length"] == before["acceptance_length"]
    assert again["walks"] == before["walks"]


@pytest.mark.long
def test_the_gate_opens_for_a_right_export_and_names_what_is_wrong_in_others(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "gate"
    args = ["bench", "gate", "--recipe", RECIPE, *overrides(pipeline), "--store", pipeline / "store/train"]
    args += ["--output", output, "--samples", "20", "--steps", "150"]
    printed = run(*args).stdout
    assert "gate: open" in printed
    good = json.loads((output / "export/config.json").read_text())
    layers = [layer + 1 for layer in good["dflash_config"]["target_layer_ids"]]
    bad = {**good, "dflash_config": {**good["dflash_config"], "target_layer_ids": layers}}
    (output / "export/config.json").write_text(json.dumps(bad))
    for name in ("run.json", "served.json"):
        (output / name).unlink()
    result = run(*args, check=False)
    assert result.returncode == 1
    assert f"The layers that it reads: the export says {layers}" in result.stderr


def test_conversations_of_another_target_are_refused_in_one_line(
    pipeline: Path, other_target_folder: Path, tmp_path: Path
) -> None:
    args = ["--recipe", RECIPE, "--set", f"target.path={other_target_folder}", "--set", "target.num_aux_layers=2"]
    args += ["--output", tmp_path / "out"]
    result = run("dump", "run", *args, "--conversations", pipeline / "synth/train", check=False)
    assert result.returncode == 2
    assert "found conversations of target" in result.stderr
    assert result.stderr.count("\n") == 1
    assert load_recipe(RECIPE).target.path != other_target_folder

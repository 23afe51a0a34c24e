"""Claims about a draft's certificate: it says what the reports say, and whatever is changed is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cited import OVERLAP, TRACKERS, Cited, write_run
from conftest import run_here
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from common.errors import IncompleteError
from common.files import hash_json, write_json
from contracts.certificate import Certificate, find_digests, read_certificate
from target.target import Target
from train.card import make_card


@pytest.fixture(scope="module")
def cited(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Cited:
    return Cited(tmp_path_factory.mktemp("cited"), recipe_path, Target.read(target_folder))


@pytest.fixture
def export(cited: Cited, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cited.exported, tmp_path / "export"))


def check(folder: Path, *words: object) -> Any:
    return run_here("train", "export", "--check", folder, *words, check=False)


def test_a_certificate_says_what_the_reports_and_the_data_say(cited: Cited) -> None:
    certificate, _ = read_certificate(cited.exported)
    report = json.loads(cited.evaluation.read_text())
    first, again = certificate.predicted
    assert (first.set, again.set, first.acceptance_length) == ("store", "again", report["acceptance_length"])
    assert (first.trained_on, report["trained_on"]) == (10, 10)
    assert [(row.thinking_mode, row.temperature, row.n) for row in first.rows] == [("", 0.0, 10)]
    assert list(first.rows[0].interval or ()) == report["interval"]
    (served,) = certificate.served
    assert [(row.num_draft_tokens, row.thinking_mode, row.acceptance_length) for row in served.rows] == [
        (1, "disabled", 1.0), (1, "enabled", 2.0), (3, "disabled", 2.0), (3, "enabled", 2.0),
    ]  # fmt: skip
    assert {row.set for row in served.rows} == {"held_out"}
    assert served.overlap is not None
    assert served.overlap.model_dump(mode="json") == {
        **{key: OVERLAP[key] for key in ("sets", "acceptance")}, "training": ["e" * 64],
    }  # fmt: skip
    assert (served.environment, served.speeds[0].concurrency) == ({"vllm": "0.32.0"}, 1)
    assert (served.equality[0].identical, served.equality[0].total) == (4, 4)
    assert (certificate.lossless[0].replies, certificate.lossless[0].ties) == (9, 1)
    accuracy = json.loads((cited.accuracy / "accuracy.json").read_text())
    (compared,) = certificate.accuracy
    assert [row.model_dump(mode="json") for row in compared.rows] == accuracy["rows"]
    assert [(row.answers, row.base, row.draft) for row in compared.rows] == [("greedy", 1, 0.9), ("sampled", 1, 0.9)]
    assert (compared.min_questions, compared.replies[0].identical, compared.confidence) == (9, 9, 0.99)
    data = certificate.data
    assert data.synthesis is not None
    assert data.prompts is not None
    assert (data.samples, data.synthesis.counts["done"], data.synthesis.sampling["temperature"]) == (10, 2, [0.0])
    assert [(source.name, source.license) for source in data.prompts.sources] == [
        ("chat", "cc-by-4.0"),
        ("own", None),
    ]
    assert certificate.training.environment["python"]
    assert certificate.training.trackers == {"wandb": TRACKERS["wandb"]}
    assert "somebody" not in (cited.exported / "certificate.json").read_text()
    assert certificate.target.fingerprint == cited.target.fingerprint
    assert set(certificate.files) == {"config.json", "draftline.json", "model.safetensors", "README.md"}


def test_the_card_holds_every_figure_and_the_hubs_model_index(cited: Cited) -> None:
    text = (cited.exported / "README.md").read_text()
    certificate, _ = read_certificate(cited.exported)
    assert text == make_card(certificate)
    card = ModelCard(text)
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    rows = [row for part in (*certificate.predicted, *certificate.served) for row in part.rows]
    scores = [row.draft for part in certificate.accuracy for row in part.rows]
    assert sorted(found.metric_value for found in results) == sorted(
        [*(row.acceptance_length for row in rows), *scores]
    )
    assert {result.dataset_type for result in results} == {"store", "again", "held_out", "sums"}
    greedy = next(result for result in results if result.metric_type == "acc")
    assert greedy.metric_args["without_draft"] == 1.0
    assert (greedy.metric_args["difference"], greedy.metric_args["is_beyond_chance"]) == (-0.1, False)
    assert card.data.datasets == ["org/set"]
    assert card.content.splitlines() == text.splitlines()  # the hub writes the same block again
    for said in (
        "The draft was trained on 10 of the samples of store: on other conversations it accepts less.",
        "| held_out | 4 | 1 |",
        "| 3 | 1.500 [1.000, 2.000], n = 2 | 1.500 [1.000, 2.000], n = 2 |  |",
        "| chat | org/set | 20 | 18 | cc-by-4.0 |",
        "| own | own.jsonl | 4 | 4 | not stated |",
        "Questions of gsm8k were kept out.",
        "| run at wandb | [r1](https://wandb.ai/r1) |",
        "| held_out | enabled | 0 | 3 | 2.000 [",
        "--speculative-draft-model-path '<this folder>' --speculative-algorithm DFLASH",
        "| `bench acceptance` on held_out, all K | 4 | 4 |  |",
        "| `bench lossless`: prefix cache, chunked prefill, 8 at once, tool calls | 9 | 8 | 1 ties within 0.001 |",
        "None of 2 differences is larger than chance explains (99% for the whole table).",
        "| recipe-c4 | sums | acc,none | greedy | 10 | 1.0000 | 0.9000 | -0.1000 ± 0.1000 | 0.1000 |",
        "| recipe-c4 | sums | greedy | 9 of 10 | 0 | 0 | 3.000 |",
        "Sampled with temperature 1.0, ",
        *certificate.files["model.safetensors"].split(),
    ):
        assert said in text


def test_a_folder_that_nobody_changed_is_what_its_certificate_says(cited: Cited, export: Path) -> None:
    for words in ([], [*cited.cited, "--served", f"other_name={cited.served}"]):
        result = check(export, *words)
        assert result.returncode == 0, result.stdout
        assert read_certificate(export)[0].digest in result.stdout
    assert "is finished, skipped" in cited.export("export", *cited.cited).stdout
    (export / "LICENSE").write_text("as the target's")
    (export / ".gitattributes").write_text("*.safetensors filter=lfs")
    result = check(export)
    assert (result.returncode, "LICENSE is not in the certificate" in result.stdout) == (0, True)


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_in(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip, "model.safetensors: sha256"),
        (replace_in("certificate.json", '"acceptance_length": 2.0', '"acceptance_length": 2.4'),
         "certificate.json: section served was changed"),
        (replace_in("certificate.json", '"acceptance_length": 2.0', '"acceptance_length": 2.4'),
         "README.md, line 88: says 'value: 2.0', the certificate 'value: 2.4'"),
        (replace_in("certificate.json", '"is_beyond_chance": false', '"is_beyond_chance": true'),
         "certificate.json: section accuracy was changed"),
        (replace_in("README.md", "| 0.9000 | -0.1000 ±", "| 1.0000 | +0.0000 ±"),
         "the certificate '| recipe-c4 | sums | acc,none | greedy | 10 | 1.0000 | 0.9000 | -0.1000 ± 0.1000"),
        (replace_in("README.md", "without_draft: 1.0", "without_draft: 0.9"), "the certificate 'without_draft: 1.0'"),
        (replace_in("certificate.json", '"done": 2', '"done": 3'), "certificate.json: section data was changed"),
        (replace_in("certificate.json", '"format_version": 2', '"format_version":  2'), "its bytes are not"),
        (replace_in("certificate.json", '"digest": "', '"digest": "0'), "certificate.json: its digests were changed"),
        (replace_in("certificate.json", '"samples": 10', '"samples": "ten"'), "certificate.json: found data.samples: "),
        (replace_in("README.md", "| 2.000 [", "| 2.400 ["), "the certificate '| held_out | enabled | 0 | 1 | 2.000 ["),
        (replace_in("README.md", "value: 2.0", "value: 2.4"), "says 'value: 2.4', the certificate 'value: 2.0'"),
        (replace_in("draftline.json", '"num_steps": 12', '"num_steps": 13'), "draftline.json: sha256"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "README.md").unlink(), "README.md: no such file"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin: not in the certificate"),
    ],
)  # fmt: skip
def test_whatever_is_changed_in_a_folder_is_found_and_named(
    export: Path, change: Callable[[Path], None], told: str
) -> None:
    change(export)
    result = check(export)
    assert result.returncode in (1, 2)
    assert told in result.stdout + result.stderr


def append(path: Path, text: str) -> Callable[[], None]:
    def change() -> None:
        with path.open("a") as file:
            file.write(text)

    return change


def test_data_that_was_changed_after_the_training_is_found_and_named(cited: Cited, export: Path) -> None:
    changes = {
        cited.store / "manifest.json": "store_facts: manifest: found",
        cited.store / "ledger.jsonl": "ledger.jsonl: found the samples with checksum",
        cited.conversations / "conversations.jsonl": "conversations.jsonl: found the conversations with checksum",
        cited.prompts: "data.prompts: manifest: found",
    }
    for path, told in changes.items():
        before = path.read_bytes()
        path.write_bytes(before + (b'{"id": "c"}\n' if path.suffix == ".jsonl" else b"\n"))
        result = check(export, "--store", cited.store, "--prompts", cited.prompts)
        path.write_bytes(before)
        assert (result.returncode, told in result.stdout) == (1, True), result.stdout
    assert check(export, "--store", cited.store, "--prompts", cited.prompts).returncode == 0


def seal(folder: Path, values: dict[str, Any]) -> Certificate:
    """Write the certificate of changed values, with its card and all digests computed anew."""
    forged = Certificate.model_validate({**values, "digests": {}, "digest": ""})
    card = make_card(forged)
    forged = forged.sealed(card)
    forged.write(folder)
    (folder / "README.md").write_text(card)
    return forged


def test_a_forged_certificate_is_found_by_the_report_that_it_cites(cited: Cited, export: Path) -> None:
    certificate, values = read_certificate(export)
    values["served"][0]["rows"][0]["acceptance_length"] = 3.9
    forged = seal(export, values)
    assert check(export).returncode == 0  # nobody can tell but by its digest
    assert forged.digest != certificate.digest
    result = check(export, "--served", cited.served)
    assert result.returncode == 1
    assert "check: served: rows.0.acceptance_length: found 1.0, certified 3.9\n" in result.stdout


def test_a_forged_score_is_found_by_the_report_that_the_certificate_cites(cited: Cited, export: Path) -> None:
    values = read_certificate(export)[1]
    values["accuracy"][0]["rows"][0]["draft"] = 1.0
    seal(export, values)
    assert check(export).returncode == 0
    result = check(export, "--served", cited.accuracy)
    assert result.returncode == 1
    assert "check: accuracy: rows.0.draft: found 0.9, certified 1.0\n" in result.stdout


def test_a_difference_beyond_chance_ends_with_an_error_and_is_stated_on_the_card(cited: Cited) -> None:
    with pytest.raises(IncompleteError, match="The draft changes the target's answers"):
        cited.compare_answers("worse", questions=30, wrong=20)
    cited.export("worse-export", "--served", cited.folder / "worse")
    (compared,) = read_certificate(cited.folder / "worse-export")[0].accuracy
    assert [row.is_beyond_chance for row in compared.rows] == [True, True]
    card = (cited.folder / "worse-export/README.md").read_text()
    assert "**The draft changes the target's answers:** 2 of 2 differences are larger than chance explains (99%" in card
    assert "± 0.0875 | 0.4000 **too large** |" in card
    cited.export("worse-export", "--served", cited.lossless)  # adds a kind of figures, and keeps the others
    again, _ = read_certificate(cited.folder / "worse-export")
    assert (again.accuracy, len(again.lossless)) == ([compared], 1)


def test_a_certificate_of_the_format_without_accuracy_is_still_checked(export: Path) -> None:
    values = read_certificate(export)[1]
    del values["accuracy"]
    values["format_version"] = 1
    values["digests"] = find_digests(values)
    values["digest"] = hash_json(values["digests"])
    write_json(export / "certificate.json", values)
    assert check(export).returncode == 0
    replace_in("README.md", "| 2.000 [", "| 2.400 [")(export)
    assert "README.md: sha256" in check(export).stdout


def test_figures_of_another_draft_or_of_an_earlier_version_are_refused(cited: Cited, tmp_path: Path) -> None:
    report = json.loads(cited.evaluation.read_text())
    other, old = tmp_path / "other.json", tmp_path / "old.json"
    other.write_text(json.dumps({**report, "inputs": {**report["inputs"], "draft": "f" * 64}}))
    old.write_text(json.dumps({key: value for key, value in report.items() if key != "rows"}))
    assert "found an evaluation of another checkpoint" in cited.export("a", "--eval", other, check=False).stderr
    assert "Run the same `train eval` again" in cited.export("b", "--eval", old, check=False).stderr
    bench = Path(shutil.copytree(cited.served, tmp_path / "bench"))
    (bench / "acceptance.json").write_text("{}")
    assert "Run the same `bench acceptance` again" in cited.export("c", "--served", bench, check=False).stderr
    assert "found the output of `train offline`" in cited.export("d", "--served", cited.run, check=False).stderr
    assert not [name for name in "abcd" if (cited.folder / name).exists()]


@pytest.mark.parametrize("key", ["draft", "target"])
def test_accuracy_of_another_draft_or_target_is_refused(cited: Cited, tmp_path: Path, key: str) -> None:
    other = Path(shutil.copytree(cited.accuracy, tmp_path / "accuracy"))
    state = json.loads((other / "run.json").read_text())
    state["inputs"][key] = "f" * 64
    (other / "run.json").write_text(json.dumps(state))
    refused = cited.export("refused", "--served", other, check=False)
    assert refused.returncode == 2
    told = f"{other}: found figures of another {key} (ffffffffffff), expected this {key}'s ({cited.inputs[key][:12]})."
    assert told in refused.stderr
    assert not (cited.folder / "refused").exists()


def test_a_folder_of_bench_that_no_card_cites_is_refused_by_name(cited: Cited, tmp_path: Path) -> None:
    write_run(tmp_path / "sweep", "bench sweep", cited.inputs, {}, {})
    refused = cited.export("refused", "--served", tmp_path / "sweep", check=False)
    assert refused.returncode == 2
    cited_by_cards = "that of `bench acceptance`, `bench lossless` or `bench accuracy`"
    assert f"found the output of `bench sweep`, expected {cited_by_cards}" in refused.stderr
    assert "A sweep measures one number of draft tokens, without intervals" in refused.stderr


def test_an_export_without_reports_says_what_is_missing(cited: Cited) -> None:
    assert cited.fingerprint
    plain = (cited.folder / "plain/README.md").read_text()
    for said in (
        "Not evaluated", "Not served", "Not checked", "No recommended number", "Licenses of the prompts",
        "Accuracy with and without the draft was not compared",
    ):  # fmt: skip
        assert said in plain
    assert "model-index" not in plain
    assert check(cited.folder / "plain").returncode == 0


def test_options_that_contradict_each_other_are_refused(cited: Cited) -> None:
    for words in (["--check", "x", "--push", "a/b"], ["--run", "x"], [*cited.recipe, "--output", "x"], ["--public"]):
        assert run_here("train", "export", *words, check=False).returncode == 2

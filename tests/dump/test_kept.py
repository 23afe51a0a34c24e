"""Claims about stores with fewer bytes: the target's most likely tokens, and no states that no block sees."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_lines, run_here
from written import write_conversations

from common.errors import UserError
from contracts.sample_file import SampleForm, StoredSample, read_sample_tensor
from contracts.store import Store
from drafts.places import predicting_spans, seen_spans, spans_of
from drafts.teacher import find_top_tokens
from dump.judge import judge_states
from dump.kept import Kept
from dump.run import make_manifest
from recipe.load import load_recipe
from target.head import read_head
from target.target import Target
from train.draft import make_config
from train.walk import expected_acceptances, refuse_inexact, walk_sample

TOP = ("--set", "dump.final_states=top-k", "--set", "dump.top_k=16")
TRIM = ("--set", "dump.unseen_states=drop")
DISTILL = ("--set", "train.draft.objective=distill")
FORMS = {
    "whole": (),
    "trimmed": TRIM,
    "top": TOP,
    "top-trimmed": (*TOP, *TRIM),
    "least": (*TOP, *TRIM, "--set", "dump.dtype=int4"),
}
EAGLE3 = (
    "--set", "train.draft.method=eagle3", "--set", "train.draft.objective=distill", "--set", "train.draft.ttt_length=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def stores(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of the same conversations, by what they keep: two that are dumped, the others made from the whole one."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("whole", "least"):
        args = ("-r", recipe_path, "--conversations", conversations, "--set", "dump.backend=hf", *FORMS[name])
        dump_here(*args, "--output", folder / name, in_threads=name == "whole")
        plan = run_here("dump", "plan", *args).stdout
        summary = json.loads((folder / name / "run.json").read_text())["summary"]
        planned = int(next(line for line in plan.splitlines() if line.startswith("bytes")).split()[1])
        assert summary["bytes"] <= planned <= summary["bytes"] + 1536 * summary["samples"]
    for name in FORMS.keys() - {"whole", "least"}:
        rewrite(folder / "whole", folder / name, recipe_path, FORMS[name])
    return {name: folder / name for name in FORMS}


def dump_here(*args: object, in_threads: bool) -> None:
    """`dump run`. A writer process imports torch first: threads take a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        if in_threads:
            patch.setattr("dump.fill.open_writers", ThreadPoolExecutor)
        run_here("dump", "run", *args)


def rewrite(whole: Path, folder: Path, recipe_path: Path, sets: tuple[str, ...]) -> None:
    """Make what a dump with other settings would have made."""
    recipe = load_recipe(recipe_path, list(sets[1::2]))
    target = Target.here(recipe.target)
    kept = Kept.of(recipe, target)
    shutil.copytree(whole, folder)
    store, lines = Store(folder), read_lines(folder / "ledger.jsonl")
    for line in lines:
        sample = kept.trim(store.read_sample(line["id"]))
        line |= store.write_sample(line["id"], sample, final_states=kept.final_state == "pre-norm")
    store.ledger_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = store.read_manifest()
    found = make_manifest(recipe, target, Path(old.conversations_folder), old.conversations)
    store.write_manifest(found.model_copy(update={"engine": old.engine, "engine_version": old.engine_version}))


def train(recipe: Path, store: Path, output: Path, *more: str, check: bool = True) -> str:
    done = run_here("train", "offline", "-r", recipe, "--store", store, "--output", output, *more, check=check)
    return done.stdout if check else done.stderr


def losses(folder: Path) -> list[tuple[float, float]]:
    found = [(line["loss"], line["grad_norm"]) for line in read_lines(folder / "metrics.jsonl")]
    assert found
    return found


def samples_of(folder: Path) -> list[StoredSample]:
    store = Store(folder)
    return [store.read_sample(id_) for id_ in store.sample_ids()]


def found_id(stores: dict[str, Path]) -> str:
    return Store(stores["whole"]).sample_ids()[0]


def test_a_dump_keeps_the_tokens_that_its_own_final_states_give(stores: dict[str, Path], target_folder: Path) -> None:
    head, stored = read_head(Target.read(target_folder)), 0
    assert read_sample_tensor(Store(stores["least"]).sample_path(found_id(stores)), "top_ids").dtype == torch.uint16
    for name in ("top", "top-trimmed", "least"):
        for found, whole in zip(samples_of(stores[name]), samples_of(stores["whole"]), strict=True):
            assert found.top is not None
            assert found.hidden_states.shape[1] == 0
            rows = found.has("top").nonzero()[:, 0]
            assert torch.equal(rows, whole.loss_mask.nonzero()[:, 0] - 1)
            expected = find_top_tokens(head, whole.hidden_states[rows], 16)
            assert torch.equal(found.top.at(rows).ids, expected.ids)
            torch.testing.assert_close(found.top.at(rows).log_probs, expected.log_probs)
            stored += len(rows)
    assert stored == 3 * 600


def test_a_trimmed_store_has_the_states_of_a_whole_one_where_it_has_any(stores: dict[str, Path]) -> None:
    for found, whole in zip(samples_of(stores["trimmed"]), samples_of(stores["whole"]), strict=True):
        generated = spans_of(whole.loss_mask)
        kept = {"aux_hidden_states": seen_spans(generated, None), "hidden_states": predicting_spans(generated)}
        assert found.spans == kept
        for name in kept:
            rows = found.has(name)
            assert 0 < int(rows.sum()) < len(rows)
            assert torch.equal(getattr(found, name)[rows], getattr(whole, name)[rows])
            assert not getattr(found, name)[~rows].any()


@pytest.mark.parametrize("method", [DISTILL, EAGLE3], ids=["dflash", "eagle3"])
def test_training_on_a_trimmed_store_gives_the_bits_of_the_whole_one(
    recipe_path: Path, stores: dict[str, Path], tmp_path: Path, method: tuple[str, ...]
) -> None:
    if method is EAGLE3:
        method = (*method, "--set", "target.num_aux_layers=2")
    for name in ("whole", "trimmed"):
        train(recipe_path, stores[name], tmp_path / name, *method)
    assert losses(tmp_path / "whole") == losses(tmp_path / "trimmed")
    weights = [(tmp_path / name / "step-000012/weights.safetensors").read_bytes() for name in ("whole", "trimmed")]
    assert weights[0] == weights[1]


def test_the_top_tokens_teach_and_predict_what_the_states_do(
    recipe_path: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("whole", "top", "top-trimmed"):
        train(recipe_path, stores[name], tmp_path / name, *DISTILL)
        args = ("--run", tmp_path / name, "--output", tmp_path / f"{name}.json", "-r", recipe_path, *DISTILL)
        run_here("train", "eval", *args, "--store", stores[name])
    assert losses(tmp_path / "top") == losses(tmp_path / "top-trimmed")
    own = ("acceptance_length", "expected_acceptance_length", "per_position", "walks")
    evaluated = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("top", "top-trimmed")]
    assert [evaluated[0][key] for key in own] == [evaluated[1][key] for key in own]
    again = tmp_path / "again.json"
    run_here(
        "train", "eval", "--run", tmp_path / "top", "--output", again, "-r", recipe_path, "--store", stores["whole"]
    )
    assert [json.loads(again.read_text())[key] for key in own] == [evaluated[0][key] for key in own]
    for (loss, _), (found, _) in zip(losses(tmp_path / "whole"), losses(tmp_path / "top"), strict=True):
        assert 0 < found < loss  # the rest is one outcome: a smaller cross-entropy


def test_the_proof_compares_the_first_stored_token_and_says_what_it_cannot_prove(
    recipe_path: Path, stores: dict[str, Path]
) -> None:
    for name in ("top", "top-trimmed", "least"):
        printed = run_here("dump", "verify", "-r", recipe_path, "--store", stores[name]).stdout
        assert "600 of 600 generated tokens of 60 greedy samples are the most likely ones" in printed
        assert "without final states the log-probabilities were not computed again" in printed
        assert "all layers of 8 samples are as transformers computes them" in printed
    assert "600 of 600 generated" in run_here("dump", "verify", "-r", recipe_path, "--store", stores["trimmed"]).stdout
    shown = run_here("dump", "inspect", stores["top"], Store(stores["top"]).sample_ids()[0]).stdout
    assert "probability of all but the 16 most likely tokens" in shown


def test_what_needs_all_states_refuses_a_store_without_them(
    recipe_path: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    train(recipe_path, stores["top"], tmp_path / "draft")
    for name, words in (("top", "dump.final_states=top-k"), ("trimmed", "dump.unseen_states=drop")):
        for args in (
            ("dump", "convert", stores[name], "--to", "modelopt", "--output", tmp_path / "converted"),
            ("train", "trace", "-r", recipe_path, "--run", tmp_path / "draft", "--store", stores[name],
             "--output", tmp_path / "trace"),
        ):  # fmt: skip
            refused = run_here(*args, check=False)
            assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
    sets = ("--set", "train.draft.objective=top_k_kl", "--set", "train.draft.objective_top_k=17")
    assert "expected the 17 tokens of" in train(recipe_path, stores["top"], tmp_path / "no", *sets, check=False)
    recipe = load_recipe(recipe_path, [TOP[1], "dump.top_k=10000000"])
    with pytest.raises(UserError, match=r"dump\.top_k: found 10000000"):
        Kept.of(recipe, Target.here(recipe.target))


def test_a_draft_that_sees_farther_than_the_store_reaches_is_refused(
    recipe_path: Path, stores: dict[str, Path]
) -> None:
    recipe = load_recipe(recipe_path)
    target = Target.here(recipe.target)
    manifest = Store(stores["trimmed"]).read_manifest()
    assert make_config(recipe, target, manifest).reach is None
    sliding = load_recipe(recipe_path, ["train.draft.sliding_window=9"])
    for reach, allowed in ((7, False), (8, True), (9, True), (None, True)):
        windowed = manifest.model_copy(update={"seen_reach": reach})
        if allowed:
            assert make_config(sliding, target, windowed).reach == 8
        else:
            with pytest.raises(
                UserError, match="found a draft that sees 8 tokens before an anchor, expected at most 7"
            ):
                make_config(sliding, target, windowed)
    with pytest.raises(UserError, match="sees all tokens before an anchor"):
        make_config(recipe, target, manifest.model_copy(update={"seen_reach": 8}))


def test_a_dump_for_a_sliding_draft_keeps_its_window_alone(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    conversations = write_conversations(target_folder, tmp_path / "conversations", 9, shared=60)
    sliding = ("--set", "train.draft.sliding_window=9")
    args = ("-r", recipe_path, "--conversations", conversations, "--output", tmp_path / "whole")
    dump_here(*args, "--set", "dump.backend=hf", *sliding, in_threads=True)
    rewrite(tmp_path / "whole", tmp_path / "trimmed", recipe_path, (*sliding, *TRIM))
    for name in ("whole", "trimmed"):
        train(recipe_path, tmp_path / name, tmp_path / f"draft-{name}", "--set", "train.draft.sliding_window=9")
    assert Store(tmp_path / "trimmed").read_manifest().seen_reach == 8
    assert all(int(sample.has("aux_hidden_states").sum()) == 8 + 8 for sample in samples_of(tmp_path / "trimmed"))
    assert losses(tmp_path / "draft-whole") == losses(tmp_path / "draft-trimmed")


def sampled(top_k: int, penalty: float = 1.0) -> dict[str, str]:
    sampling = {"temperature": 0.7, "top_k": top_k, "repetition_penalty": penalty}
    return {"temperature": "0.7", "sampling": json.dumps(sampling)}


def test_sampled_replies_are_predicted_only_if_the_stored_tokens_tell_their_distribution(
    stores: dict[str, Path], target_folder: Path
) -> None:
    head = read_head(Target.read(target_folder))
    whole, found = (samples_of(stores[name])[0] for name in ("whole", "top"))
    drafted = whole.input_ids.long().roll(-1)[:, None].expand(-1, 3)
    exact = [replace(sample, metadata=sampled(16)) for sample in (whole, found)]
    refuse_inexact(exact[1], "id")
    expected = [expected_acceptances(walk_sample(sample, drafted), sample, head) for sample in exact]
    assert expected[1] == pytest.approx(expected[0], rel=1e-3)
    assert expected[0] > 1
    for metadata in (sampled(17), sampled(-1), sampled(16, penalty=1.1)):
        with pytest.raises(UserError, match=r"sampled at temperature 0\.7, and 16 log-probabilities"):
            refuse_inexact(replace(found, metadata=metadata), "id")
        refuse_inexact(replace(whole, metadata=metadata), "id")
        assert judge_states(head, replace(found, metadata=metadata), [1, 2], "float32").is_beyond


def test_a_sample_whose_stored_tokens_are_another_ones_fails_the_proof(
    stores: dict[str, Path], target_folder: Path
) -> None:
    head = read_head(Target.read(target_folder))
    sample = samples_of(stores["top"])[0]
    assert sample.top is not None
    good = judge_states(head, sample, [1, 2], "float32")
    assert (good.matches, good.found) == (10, "")
    shifted = replace(sample, top=sample.top.at(torch.arange(sample.num_tokens).roll(1)))
    assert "10 generated tokens that its states do not predict" in judge_states(head, shifted, [1, 2], "float32").found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3", "int4"])
def test_no_file_is_larger_than_its_form_says(tmp_path: Path, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    store = Store(tmp_path)
    for number, share in enumerate((0.1, 0.5, 0.9)):
        mask = (torch.rand(100, generator=generator) < share).repeat_interleave(2)
        states = torch.randn(200, 64, generator=generator)
        sample = StoredSample(
            torch.arange(200, dtype=torch.int32), mask, states, states.repeat(1, 2), {"id": "x" * 300}
        )
        for form in (SampleForm(64, 2, dtype, has_spans=True), SampleForm(64, 2, dtype, "none", has_spans=True)):
            kept = Kept(final_state=form.final_state, unseen=False, reach=3)
            id_ = f"{number:032x}-0"
            fields = store.write_sample(id_, kept.trim(sample), dtype, final_states=form.final_state == "pre-norm")
            assert fields["size"] <= form.num_bytes(200) + form.header_bytes
            found = store.read_sample(id_, final_states=False)
            assert found.hidden_states.shape == (200, 0)
            rows = found.has("aux_hidden_states")
            tolerance = {"float32": 0.0, "bfloat16": 0.01, "fp8_e4m3": 0.07, "int4": 0.4}[dtype]
            torch.testing.assert_close(
                found.aux_hidden_states[rows].float(), sample.aux_hidden_states[rows], rtol=tolerance, atol=tolerance
            )
            assert not found.aux_hidden_states[~rows].any()

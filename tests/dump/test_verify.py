"""Claims about the proof: a good store passes; each defect that training would not notice is named with its sample."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_lines, run_here
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM
from written import write_conversations

from contracts.store import Store, StoredSample
from dump.diagnose import name_defect
from dump.judge import judge_states
from dump.predictions import logit_gaps, sampled_deviations, sampling_of
from dump.reference import fits_memory
from dump.verify import Part
from target.head import TargetHead, read_head
from target.sampling import Context, kept_by, probabilities_of
from target.target import Target


@pytest.fixture(scope="module")
def good(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "good"
    args = ("-r", recipe_path, "--conversations", conversations, "--output", folder, "--set", "dump.backend=hf")
    run_here("dump", "run", *args)
    return folder


def seed(good: Path, folder: Path, change: Callable[[StoredSample, Store, str], None]) -> str:
    """A copy of the store in which every sample is changed, its ledger in agreement; the first sample's id."""
    shutil.copytree(good, folder)
    store = Store(folder)
    lines = sorted(read_lines(store.ledger_path), key=lambda line: line["id"])
    for line in lines:
        sample = store.read_sample(line["id"])
        change(sample, Store(good), line["id"])
        line |= store.write_sample(line["id"], sample)
    store.ledger_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(lines[0]["id"])


def normed(sample: StoredSample, *_: object) -> None:
    states = sample.hidden_states
    sample.hidden_states = torch.nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)


def shifted(sample: StoredSample, *_: object) -> None:
    """The layers' slots hold other layers: the second one's output stands in the first slot."""
    first, second = sample.aux_hidden_states.unflatten(1, (2, -1)).unbind(1)
    sample.aux_hidden_states = torch.cat([second, first], dim=1)


def zeroed(sample: StoredSample, *_: object) -> None:
    sample.hidden_states = torch.zeros_like(sample.hidden_states)


def one_token_missing(sample: StoredSample, *_: object) -> None:
    for name in ("input_ids", "loss_mask", "hidden_states", "aux_hidden_states"):
        setattr(sample, name, getattr(sample, name)[1:])


def of_another_conversation(sample: StoredSample, store: Store, sample_id: str) -> None:
    other = next(
        found
        for found in (store.read_sample(id_) for id_ in store.sample_ids() if id_ != sample_id)
        if found.num_tokens == sample.num_tokens
    )
    sample.hidden_states = other.hidden_states


def one_token_late(sample: StoredSample, *_: object) -> None:
    sample.hidden_states = sample.hidden_states.roll(1, 0)


def masked_too_much(sample: StoredSample, *_: object) -> None:
    sample.loss_mask = torch.ones_like(sample.loss_mask)


def verify(recipe: Path, store: Path) -> tuple[int, str]:
    result = run_here("dump", "verify", "-r", recipe, "--store", store, check=False)
    return result.returncode, result.stderr + result.stdout


def test_a_good_store_passes(recipe_path: Path, good: Path) -> None:
    code, printed = verify(recipe_path, good)
    assert code == 0, printed
    assert "600 of 600 generated tokens of 60 greedy samples are the states' argmax" in printed
    assert "tokens and masks of 60 samples are the conversations'" in printed
    assert "all layers of 8 samples are as transformers computes them" in printed
    assert "mode enabled: 300 of" in printed


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (normed, "the final state is normed already"),
        (zeroed, "all zero"),
        (one_token_missing, "1 tokens missing, first at 0"),
        (of_another_conversation, "states of another conversation"),
        (one_token_late, "the states are one token later"),
        (masked_too_much, "a loss mask of"),
        (shifted, "found the output of layer"),
    ],
)
def test_each_seeded_defect_is_named_with_the_first_sample_that_has_it(
    recipe_path: Path, good: Path, tmp_path: Path, defect: Callable[..., None], words: str
) -> None:
    first = seed(good, tmp_path / "bad", defect)
    code, printed = verify(recipe_path, tmp_path / "bad")
    assert code == 1, printed
    assert words in printed
    assert first in printed


def test_layers_that_are_off_by_one_are_named(recipe_path: Path, conversations: Path, tmp_path: Path) -> None:
    args = ("-r", recipe_path, "--conversations", conversations, "--output", tmp_path / "bad", "--set")
    run_here("dump", "run", *args, "dump.backend=hf", "--set", "target.aux_layers=[1,2]")
    manifest = json.loads((tmp_path / "bad/manifest.json").read_text())
    (tmp_path / "bad/manifest.json").write_text(json.dumps({**manifest, "layer_ids": [0, 1]}))
    code, printed = verify(recipe_path, tmp_path / "bad")
    assert code == 1
    assert "found the output of layer 1" in printed
    assert "expected the output of layer 0" in printed


def build_gemma(folder: Path, vocabulary: Path) -> Path:
    """A Gemma of random weights, its norms' too, under another target's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = GemmaConfig(
        vocab_size=json.loads((vocabulary / "config.json").read_text())["vocab_size"], hidden_size=64,
        intermediate_size=96, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=512, initializer_range=0.15, dtype="float32",
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = GemmaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_a_gemma_norm_is_proven_and_an_rms_norm_in_its_place_is_named(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    folder = build_gemma(tmp_path / "gemma", target_folder)
    conversations = write_conversations(folder, tmp_path / "conversations", 18)
    more = ("-r", recipe_path, "--set", f"target.path={folder}", "--set", "dump.backend=hf")
    run_here("dump", "run", *more, "--conversations", conversations, "--output", tmp_path / "good")
    printed = run_here("dump", "verify", *more, "--store", tmp_path / "good").stdout
    assert "180 of 180 generated tokens of 18 greedy samples are the states' argmax" in printed
    assert "all layers of 8 samples are as transformers computes them" in printed

    head = read_head(Target.read(folder))
    store = Store(tmp_path / "good")
    manifest, sample = store.read_manifest(), store.read_sample(store.sample_ids()[0])
    assert manifest.final_norm == "gemma"
    # The target read as an RMSNorm model:
    misread = replace(head, norm_kind="rms")
    assert "fit a gemma norm, the target is read as having a rms norm" in name_defect(misread, sample, manifest)

    def normed_by_rms(sample: StoredSample, *_: object) -> None:
        states = sample.hidden_states
        sample.hidden_states = torch.nn.functional.rms_norm(states, states.shape[-1:], head.norm, head.eps)

    first = seed(tmp_path / "good", tmp_path / "bad", normed_by_rms)
    result = run_here("dump", "verify", *more, "--store", tmp_path / "bad", check=False)
    assert result.returncode == 1
    assert "normed already, and by a rms norm, not gemma" in result.stderr
    assert first in result.stderr


def test_a_flipped_byte_is_found_in_its_file(recipe_path: Path, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bad")
    store = Store(tmp_path / "bad")
    path = store.sample_path(store.sample_ids()[7])
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    code, printed = verify(recipe_path, tmp_path / "bad")
    assert code == 2
    assert path.name in printed
    assert "as in the ledger" in printed


def test_a_manifest_with_the_other_norm_is_refused(recipe_path: Path, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bad")
    manifest = json.loads((tmp_path / "bad/manifest.json").read_text())
    (tmp_path / "bad/manifest.json").write_text(json.dumps({**manifest, "final_norm": "gemma"}))
    code, printed = verify(recipe_path, tmp_path / "bad")
    assert code == 1
    assert "(final_norm): found 'gemma', expected 'rms'" in printed


def draw(head: TargetHead, sampling: dict[str, float], count: int) -> StoredSample:
    """A sample of random states whose tokens were drawn one after the other as vLLM would."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, head.norm.shape[0], generator=generator)
    logits = head.logits(states)
    ids = torch.zeros(count + 1, dtype=torch.int32)
    for place in range(count):
        context = Context(ids, torch.tensor([place + 1]), torch.tensor([1]))
        q = probabilities_of(sampling, logits[place : place + 1], context)
        ids[place + 1] = torch.multinomial(q, 1, generator=generator)[0, 0]
    metadata = {"temperature": str(sampling["temperature"]), "sampling": json.dumps(sampling)}
    mask = torch.arange(count + 1) > 0
    return StoredSample(ids, mask, torch.cat([states, states[:1]]), torch.zeros(count + 1, 1), metadata)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
    ids=lambda sampling: ",".join(sampling),
)
def test_sampled_rows_are_as_likely_as_all_their_parameters_say_and_others_are_not(
    target_folder: Path, sampling: dict[str, float]
) -> None:
    head = read_head(Target.read(target_folder))
    right = draw(head, sampling, 2000)
    assert abs(sampled_deviations(head, right, sampling_of(right) or {})[0]) < 5
    wrong = replace(right, hidden_states=right.hidden_states.flip(0))
    assert abs(sampled_deviations(head, wrong, sampling_of(wrong) or {})[0]) > 8
    if len(sampling) > 1:
        assert abs(sampled_deviations(head, right, {"temperature": sampling["temperature"]})[0]) > 5


def test_greedy_tokens_under_penalties_are_the_argmax_of_penalized_logits(target_folder: Path) -> None:
    head = read_head(Target.read(target_folder))
    sample = draw(head, {"temperature": 0.0, "repetition_penalty": 1.5}, 300)
    assert bool((logit_gaps(head, sample, sampling_of(sample) or {})[0] == 0).all())
    assert not bool((logit_gaps(head, sample, {"temperature": 0.0})[0] == 0).all())


@pytest.mark.parametrize(("largest", "is_tie"), [(8.0, False), (30.0, True)])
def test_a_gap_that_bf16_may_round_away_depends_on_how_large_the_logits_are(
    target_folder: Path, largest: float, is_tie: bool
) -> None:
    head = read_head(Target.read(target_folder))
    sample = draw(head, {"temperature": 0.0}, 300)
    head = replace(head, scale=largest / float(head.logits(sample.hidden_states[:-1]).amax(-1).median()))
    logits = head.logits(sample.hidden_states[:-1])
    gaps = logits.amax(-1, keepdim=True) - logits
    near = largest * 0.9 < logits.amax(-1, keepdim=True)
    place, token = ((gaps > 0.26) & (gaps < 0.5) & near).nonzero()[0].tolist()
    sample.input_ids[place + 1] = token
    sample = replace(sample, aux_hidden_states=torch.ones_like(sample.aux_hidden_states))
    judged = judge_states(head, sample, [], "bfloat16")
    assert (judged.found == "") is is_tie
    assert (judged.ties == 1) is is_tie


def test_a_sample_without_a_temperature_on_record_is_counted_as_unknown(
    recipe_path: Path, good: Path, tmp_path: Path
) -> None:
    def forget(sample: StoredSample, *_: object) -> None:
        sample.metadata |= {"temperature": "", "sampling": "{}"}

    seed(good, tmp_path / "unknown", forget)
    code, printed = verify(recipe_path, tmp_path / "unknown")
    assert code == 0, printed
    assert "60 samples have no temperature on record" in printed


def test_top_k_and_top_p_keep_what_a_sampler_would_draw_from() -> None:
    q = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert kept_by(q, 0.79, None).tolist() == [[True, True, False, False]]
    assert kept_by(q, 0.81, None).tolist() == [[True, True, True, False]]
    assert kept_by(q, None, 3).tolist() == [[True, True, True, False]]
    assert kept_by(q, 0.6, 2).tolist() == [[True, False, False, False]]


def limit_host_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr("dump.reference.free_memory", lambda: num_bytes)


@pytest.mark.parametrize(
    ("host", "gpu", "fits"),
    [(3.0, None, True), (1.5, None, False), (3.0, 3.0, True), (3.0, 1.5, False), (1.5, 3.0, False)],
)
def test_the_reference_model_must_fit_the_free_memory_of_the_host_and_of_the_gpu(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch, host: float, gpu: float | None, fits: bool
) -> None:
    size = (target_folder / "model.safetensors").stat().st_size
    limit_host_memory(monkeypatch, int(host * size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int((gpu or 0) * size), 100 * size))  # free, total
    assert fits_memory(Target.read(target_folder)) is fits


def test_a_store_whose_reference_model_does_not_fit_is_verified_without_it_and_says_so(
    recipe_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_host_memory(monkeypatch, 100_000)
    result = run_here("dump", "verify", "-r", recipe_path, "--store", good, "--again", check=False)
    code, printed = result.returncode, result.stderr + result.stdout
    assert code == 0, printed
    assert "60 files whole" in printed
    assert "the layers were not compared with transformers: the target does not fit" in printed
    assert "as transformers computes them" not in printed


def test_a_drawn_part_is_checked_in_shards_and_is_no_proof_of_the_whole(
    recipe_path: Path, good: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(good, folder)
    (folder / "verified.json").unlink(missing_ok=True)
    args = ("dump", "verify", "-r", recipe_path, "--store", folder, "--reference", 0)
    assert "12 of 60 samples were checked" in run_here(*args, "--samples", 12, "--seed", 3).stdout
    assert not (folder / "verified.json").exists()
    of_recipe = (*args, "--set", "dump.verify_samples=12")
    assert "12 of 60 samples were checked" in run_here(*of_recipe).stdout
    assert "60 files whole" in run_here(*of_recipe, "--all").stdout
    ids = Store(folder).sample_ids()
    drawn = Part(12, 3).choose(ids)
    assert drawn == sorted(set(drawn)) != Part(12, 4).choose(ids)
    shards = [Part(12, 3, (number, 5)).choose(ids) for number in range(5)]
    assert sorted(id_ for part in shards for id_ in part) == drawn
    path = Store(folder).sample_path(drawn[5])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for number in range(5):
        result = run_here(*args, "--samples", 12, "--seed", 3, "--shard", f"{number}/5", check=False)
        assert (result.returncode == 2) == (drawn[5] in shards[number]), result.stderr


def test_a_second_verify_reads_only_what_has_changed(recipe_path: Path, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(good, folder)
    for name in ("verified.json", "verified.jsonl"):
        (folder / name).unlink(missing_ok=True)
    args = ("dump", "verify", "-r", recipe_path, "--store", folder, "--reference", 0)
    run_here(*args, "--samples", 12)  # a part is proven for later, too
    assert "12 of the files were proven before and have not changed" in run_here(*args).stdout
    whole = json.loads((folder / "verified.json").read_text())
    printed = run_here(*args).stdout
    assert "60 files whole; 600 of 600 generated tokens of 60 greedy samples" in printed
    assert "60 of the files were proven before and have not changed (--again reads them)" in printed
    assert json.loads((folder / "verified.json").read_text()) == {**whole, "known": 60}
    assert "proven before" not in run_here(*args, "--again").stdout

    store = Store(folder)
    path = store.sample_path(store.sample_ids()[7])
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    assert path.name in run_here(*args, check=False).stderr
    path.write_bytes(content)
    assert "59 of the files were proven before" in run_here(*args).stdout
    # The same size and time: only --again finds it.
    path.write_bytes(content[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, json.loads(proof_of(folder, path.stem))["mtime_ns"]))
    assert run_here(*args).returncode == 0
    assert path.name in run_here(*args, "--again", check=False).stderr
    assert path.name in run_here(*args, check=False).stderr  # its old proof is gone


def proof_of(folder: Path, sample_id: str) -> str:
    """Return the last line on a sample."""
    lines = (folder / "verified.jsonl").read_text().splitlines()
    return next(line for line in reversed(lines) if f'"{sample_id}"' in line)


def test_proofs_are_kept_up_to_a_kill_and_not_for_other_terms(recipe_path: Path, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(good, folder)
    path = folder / "verified.jsonl"
    args = ("dump", "verify", "-r", recipe_path, "--store", folder, "--reference", 0)
    run_here(*args, "--again")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:21]) + lines[21][:30])  # torn by a kill
    assert "20 of the files were proven before" in run_here(*args).stdout
    printed = run_here(*args[:-2]).stdout
    assert "60 of the files were proven before" in printed
    assert "all layers of 8 samples are as transformers computes them" in printed  # not compared until now
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "another"}))
    assert "proven before" not in run_here(*args).stdout

"""Claims about filling a store: backends agree, shards share it, kills and full disks lose nothing, sizes hold."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import scripted
import torch
from conftest import kill_when, read_lines, run, run_here
from written import write_conversations

from common.errors import UserError
from contracts.conversation import CONVERSATIONS_FILE, read_conversations
from contracts.store import Store
from dump.backends import make_backend
from dump.capture import Staging
from dump.run import dump as dump_in_process
from recipe.load import load_recipe
from serve.command import Serving, build_command
from serve.extraction import extraction_args, to_server_args
from serve.server import find_port, run_server
from target.layers import captured_layers
from target.target import Target

HF = ("--set", "dump.backend=hf", "--set", "dump.writers=1")


def dump(
    recipe: Path, conversations: Path, output: Path, *more: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`dump run`; in this process where that is transformers' alone."""
    args = ("-r", recipe, "--conversations", conversations, "--output", output, *more)
    return (run_here if "dump.backend=hf" in more else run)("dump", "run", *args, check=check)


def done(folder: Path) -> dict[str, dict[str, object]]:
    return {line["id"]: line for line in read_lines(folder / "ledger.jsonl") if line["status"] == "done"}


@pytest.mark.vllm
@pytest.mark.proves("extraction")
@pytest.mark.timeout(600)
def test_vllm_its_server_and_transformers_agree_layer_by_layer(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_path)
    target = Target.read(recipe.target.path)
    args = extraction_args(recipe, target, captured_layers(recipe.target, target), tmp_path / "staged")
    serving = Serving(extra_args=to_server_args(args))
    command = build_command(recipe, target, port=find_port("127.0.0.1", None), serving=serving)
    dump(recipe_path, conversations, tmp_path / "vllm")
    dump(recipe_path, conversations, tmp_path / "hf", *HF)
    with run_server(command, log_path=tmp_path / "server.log", startup_timeout_s=300) as server:
        more = ("--set", "dump.backend=server", "--set", f"dump.endpoints=[{server.url}/v1]")
        more += ("--set", f"dump.server_staging_dir={tmp_path}/staged")
        dump(recipe_path, conversations, tmp_path / "server", *more)
    # A dummy request that made the server write the last of the others may be left.
    assert len(list((tmp_path / "staged").glob("*.safetensors"))) <= 1
    reference = Store(tmp_path / "hf")
    assert len(done(tmp_path / "hf")) == 60
    for name in ("vllm", "server"):
        store = Store(tmp_path / name)
        assert done(tmp_path / name).keys() == done(tmp_path / "hf").keys()
        for sample_id in done(tmp_path / name):
            a, b = store.read_sample(sample_id), reference.read_sample(sample_id)
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.loss_mask, b.loss_mask)
            for states in ("hidden_states", "aux_hidden_states"):
                difference = (getattr(a, states) - getattr(b, states)).norm() / getattr(b, states).norm()
                assert difference < 1e-4, (name, sample_id, states)


@pytest.mark.vllm
@pytest.mark.proves("extraction")
@pytest.mark.timeout(600)
def test_states_of_a_cached_prefix_are_whole_when_caching_is_asked_for(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    conversations = write_conversations(target_folder, tmp_path / "conversations", 27, shared=96)
    more = ("--set", "dump.args.enable-prefix-caching=true", "--set", "dump.args.block-size=32")
    dump(recipe_path, conversations, tmp_path / "cached", *more)
    dump(recipe_path, conversations, tmp_path / "hf", *HF)
    store, reference = Store(tmp_path / "cached"), Store(tmp_path / "hf")
    assert len(done(tmp_path / "cached")) == 27
    for sample_id in done(tmp_path / "hf"):
        a, b = store.read_sample(sample_id), reference.read_sample(sample_id)
        for states in ("hidden_states", "aux_hidden_states"):
            assert (getattr(a, states) - getattr(b, states)).norm() / getattr(b, states).norm() < 1e-4


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("backend", "count", "kills"),
    [
        pytest.param("hf", 40, 4, marks=pytest.mark.long),
        pytest.param("vllm", 80, 6, marks=[pytest.mark.vllm, pytest.mark.long]),
        pytest.param("vllm", 500, 30, marks=[pytest.mark.vllm, pytest.mark.rare]),
    ],
)
def test_a_store_that_two_shards_fill_through_kills_holds_every_sample_once(
    recipe_path: Path, target_folder: Path, tmp_path: Path, backend: str, count: int, kills: int
) -> None:
    conversations = write_conversations(target_folder, tmp_path / "conversations", count)
    more = ("--set", f"dump.backend={backend}", "--set", "dump.writers=1")
    dump(recipe_path, conversations, tmp_path / "whole", *more)
    output = tmp_path / "killed"
    rng = random.Random(0)
    args = ["dump", "run", "-r", recipe_path, "--conversations", conversations, "--output", output, *more]
    for kill in range(kills):
        ledger = output / f"shards/0000{kill % 2}-of-00002/ledger.jsonl"
        enough = rng.randrange(1, count // kills) + len(read_lines(ledger))
        killed = kill_when(lambda: len(read_lines(ledger)) >= enough, *args, "--shard", f"{kill % 2}/2")  # noqa: B023
        assert killed == -9
    first = dump(recipe_path, conversations, output, *more, "--shard", "0/2")
    assert "1 of 2 shards are finished" in first.stdout
    unfinished = run_here("dump", "verify", "-r", recipe_path, "--store", output, check=False)
    assert unfinished.returncode == 2
    # One goes on as it began, one with another number of shards.
    for shard in ("1/2",) if backend == "vllm" else ("1/3", "0/3", "2/3"):
        joined = dump(recipe_path, conversations, output, *more, "--shard", shard).stdout
    assert f"joined {shard[-1]} shards, {count} samples" in joined
    assert f"{count} files whole" in run_here("dump", "verify", "-r", recipe_path, "--store", output).stdout
    lines = read_lines(output / "ledger.jsonl")
    assert len(lines) == len({line["id"] for line in lines}) == count
    whole, store = Store(tmp_path / "whole"), Store(output)
    for sample_id in done(output):
        a, b = store.read_sample(sample_id), whole.read_sample(sample_id)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        for states in ("hidden_states", "aux_hidden_states"):
            assert (getattr(a, states) - getattr(b, states)).norm() / getattr(b, states).norm() < 1e-5


def split(whole: Path, folder: Path, count: int, finished: tuple[int, ...]) -> None:
    """The shards of a synthesis as it is before `synth merge`."""
    for number in range(count):
        shard = folder / f"shards/{number:05d}-of-{count:05d}"
        shutil.copytree(whole, shard)
        lines = [record.model_dump_json() + "\n" for record in read_conversations(whole, (number, count))]
        (shard / CONVERSATIONS_FILE).write_text("".join(lines[::-1]))
        state = json.loads((shard / "run.json").read_text())
        (shard / "run.json").write_text(json.dumps({**state, "complete": number in finished}))


def dump_here(recipe_path: Path, conversations: Path, output: Path, shard: tuple[int, int] | None = None) -> None:
    """`dump run` in this process, which has imported transformers already."""
    dump_in_process(load_recipe(recipe_path, list(HF[1::2])), conversations, output, shard=shard)


def test_a_shard_is_dumped_as_soon_as_its_conversations_are_written_and_all_equal_a_dump_of_the_merged_ones(
    recipe_path: Path, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_conversations(target_folder, tmp_path / "whole", 20)
    dump_here(recipe_path, whole, tmp_path / "expected")
    parts, output = tmp_path / "parts", tmp_path / "store"
    split(whole, parts, 3, finished=(1,))
    with pytest.raises(UserError, match="shards/00000-of-00003: found an unfinished `synth generate`"):
        dump_here(recipe_path, parts, output, (0, 3))
    dump_here(recipe_path, parts, output, (1, 3))
    assert "1 of 3 shards are finished" in capsys.readouterr().out
    shutil.rmtree(parts / "shards")
    split(whole, parts, 3, finished=(0, 1, 2))
    dump_here(recipe_path, parts, output, (0, 3))
    shutil.rmtree(parts)
    shutil.copytree(whole, parts)  # merged, and the shards deleted: the same conversations
    dump_here(recipe_path, parts, output, (2, 3))
    assert "joined 3 shards, 20 samples" in capsys.readouterr().out
    assert done(output) == done(tmp_path / "expected")
    assert Store(output).read_manifest().conversations == Store(tmp_path / "expected").read_manifest().conversations
    printed = run_here("dump", "verify", "-r", recipe_path, "--store", output).stdout
    assert "tokens and masks of 20 samples are the conversations'" in printed


def test_a_shard_whose_conversations_were_written_anew_is_refused(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    split(write_conversations(target_folder, tmp_path / "whole", 12), parts, 2, finished=(0, 1))
    dump_here(recipe_path, parts, tmp_path / "store", (0, 2))
    path = parts / "shards/00000-of-00002" / CONVERSATIONS_FILE
    record = json.loads(path.read_text().splitlines()[0])
    record["samples"][0]["token_ids"][-1] += 1
    path.write_text(json.dumps(record) + "\n" + path.read_text().partition("\n")[2])
    with pytest.raises(UserError, match=r"inputs\.conversations"):
        dump_here(recipe_path, parts, tmp_path / "store", (0, 2))


def resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", disk], check=True)


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(
    recipe_path: Path, conversations: Path, small_disk: Path
) -> None:
    resize(small_disk, 200 * 1024)
    store = small_disk / "store"
    refused = dump(recipe_path, conversations, store, *HF, check=False)
    assert refused.returncode == 2
    assert "GB free, expected" in refused.stderr
    assert "--force" in refused.stderr
    full = dump(recipe_path, conversations, store, *HF, "--force", check=False)
    assert full.returncode == 2, full.stderr
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(store.rglob(".*.tmp"))
    resize(small_disk, 16 * 2**20)
    kept = len(done(store))
    assert 0 < kept < 60
    printed = dump(recipe_path, conversations, store, *HF).stdout
    assert f"{kept} of 60 samples are there already" in printed
    assert "60 files whole" in run_here("dump", "verify", "-r", recipe_path, "--store", store).stdout


def test_a_disk_must_hold_every_shard_that_is_still_to_be_written_and_no_finished_one(
    recipe_path: Path, conversations: Path, small_disk: Path, tmp_path: Path
) -> None:
    dump_here(recipe_path, conversations, tmp_path / "whole")
    files = [path.stat().st_size for path in (tmp_path / "whole/samples").rglob("*.safetensors")]
    size, margin = sum(files), 300 * 1024  # a tmpfs gives whole pages of 4 KiB to each of the 60 files
    store = small_disk / "store"
    resize(small_disk, size * 2 // 3)  # twice what one of three shards writes
    with pytest.raises(UserError, match=r"GB free, expected .* this dump and its unfinished shards"):
        dump_here(recipe_path, conversations, store, (0, 3))
    assert not list(store.rglob("*.safetensors"))
    resize(small_disk, size + margin)
    for number in range(3):  # the last two have not the space of three
        dump_here(recipe_path, conversations, store, (number, 3))
    assert shutil.disk_usage(small_disk).free < size // 3
    assert done(store) == done(tmp_path / "whole")


def test_over_length_samples_are_left_out_or_cut_by_flag(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    # Replies of 10 tokens after prompts of 8 to 40: at 40 tokens the last two lengths are too long.
    more = (*HF, "--set", "target.max_model_len=40")
    dump(recipe_path, conversations, tmp_path / "out", *more)
    left_out = [line for line in read_lines(tmp_path / "out/ledger.jsonl") if line["status"] == "filtered"]
    assert left_out
    assert all("more than 40" in line["reason"] for line in left_out)
    cut = ("--truncate", "--staging-dir", str(tmp_path / "staging"), "--max-reject-fraction", "0")
    dump(recipe_path, conversations, tmp_path / "cut", *more, *cut)
    entries = done(tmp_path / "cut")
    assert max(int(str(entry["tokens"])) for entry in entries.values()) == 40
    assert len(entries) > 60 - len(left_out)
    assert list((tmp_path / "staging").iterdir()) == []
    assert "files whole" in run_here("dump", "verify", "-r", recipe_path, "--store", tmp_path / "cut", *more[4:]).stdout


def test_more_rejected_samples_than_allowed_stop_the_run_with_the_first_reason(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    with scripted.serve() as server:  # without extraction
        more = ("--set", "dump.backend=server", "--set", f"dump.endpoints=[{server.url}]")
        more += ("--staging-dir", str(tmp_path / "staging"), "--no-preflight")
        result = dump(recipe_path, conversations, tmp_path / "out", *more, check=False)
    assert result.returncode == 1
    assert "samples rejected (the first: the server did not answer" in result.stderr
    assert "Traceback" not in result.stderr
    assert not json.loads((tmp_path / "out/run.json").read_text())["complete"]


def test_the_server_backend_asks_for_a_server_and_names_one_that_is_not_there(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    more = ("--set", "dump.backend=server")
    result = dump(recipe_path, conversations, tmp_path / "out", *more, check=False)
    assert result.returncode == 2
    assert "dump.endpoints: found none" in result.stderr
    recipe = load_recipe(
        recipe_path, ["dump.backend=server", "dump.endpoints=[http://127.0.0.1:9/v1]", "dump.staging_dir=x"]
    )
    with pytest.raises(UserError, match="no model list"):
        make_backend(recipe, Target.read(recipe.target.path), [1, 2], Staging(tmp_path, 1 << 20))


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 1.03), ("fp8_e4m3", 0.56), ("int4", 0.39)])
def test_bytes_are_as_planned_and_the_store_is_proven_in_every_dtype(
    recipe_path: Path, conversations: Path, tmp_path: Path, dtype: str, limit: float
) -> None:
    # The test's target is 64 wide and its samples tiny: file headers and fp8's scales weigh more than in earnest.
    more = ("--set", f"dump.dtype={dtype}")
    plan = run_here("dump", "plan", "-r", recipe_path, "--conversations", conversations, "--rate", "1000", *more).stdout
    dump(recipe_path, conversations, tmp_path / "out", *HF, *more)
    summary = json.loads((tmp_path / "out/run.json").read_text())["summary"]
    assert f"tokens       {summary['tokens']}, " in plan
    headers = 900 * summary["samples"]
    planned = int(next(line for line in plan.splitlines() if line.startswith("bytes")).split()[1])
    assert summary["bytes"] <= planned <= summary["bytes"] + 1024 * summary["samples"]
    assert summary["bytes"] - headers <= limit * 2 * 3 * 64 * summary["tokens"]
    assert "60 files whole" in run_here("dump", "verify", "-r", recipe_path, "--store", tmp_path / "out", *more).stdout


def test_a_store_without_final_states_trains_on_tokens_and_refuses_what_needs_them(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    stores = {name: tmp_path / name for name in ("keep", "drop")}
    losses, sizes = {}, {}
    for name, store in stores.items():
        dump(recipe_path, conversations, store, *HF, "--set", f"dump.final_states={name}")
        sizes[name] = json.loads((store / "run.json").read_text())["summary"]
        trained = ("--store", store, "--output", tmp_path / f"draft-{name}")
        losses[name] = run_here("train", "offline", "-r", recipe_path, *trained).stdout.split("loss ")[1].split(" in ")
    assert sizes["keep"]["bytes"] - sizes["drop"]["bytes"] >= 4 * 64 * sizes["drop"]["tokens"]  # 64 values in fp32
    assert losses["keep"][0] == losses["drop"][0]
    store = stores["drop"]
    assert "no tokens are predicted" in run_here("dump", "verify", "-r", recipe_path, "--store", store).stdout
    distill = ("--set", "train.draft.objective=distill", "--output", tmp_path / "draft")
    refused = run_here("train", "offline", "-r", recipe_path, "--store", store, *distill, check=False)
    assert (refused.returncode, "found final states that are none" in refused.stderr) == (2, True)
    evaluated = ("--run", tmp_path / "draft-drop", "--store", store, "--output", tmp_path / "eval.json")
    for words in (
        ("dump", "convert", store, "--to", "modelopt", "--output", tmp_path / "converted"),
        ("train", "eval", "-r", recipe_path, *evaluated),
    ):
        refused = run_here(*words, check=False)
        assert (refused.returncode, "found a store without final states" in refused.stderr) == (2, True)
    assert "norm of layer" in run_here("dump", "inspect", store, Store(store).sample_ids()[0]).stdout

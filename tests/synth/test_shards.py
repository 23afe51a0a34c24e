"""Claims about shards of a synthesis and their merging."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scripted
from conftest import ROOT, kill_when, read_lines, run_here
from generated import generate, settings, write

from contracts.conversation import find_part, read_conversations
from synth.browse import read_record
from synth.inspect import find_entry

FILE = "conversations.jsonl"


def shard_rows() -> list[Any]:
    rows: list[Any] = [{"id": f"row-{i % 17}", "prompt": f"q{i}"} for i in range(20)]
    # Row 20 has row 5's prompt and mode, rows 17 to 19 have earlier rows' own ids: mostly of other shards.
    return [*rows, {"prompt": "q5"}, {"no": "prompt"}, {"prompt": "endless"}]


def test_merged_shards_are_what_one_run_writes(recipe_path: Path, tmp_path: Path, server: scripted.Server) -> None:
    rows = shard_rows()
    several = settings("synth.num_samples=2", "synth.temperature=0.5")
    whole = generate(recipe_path, tmp_path, rows, server, *several)
    prompts = tmp_path / "prompts.jsonl"
    output = tmp_path / "sharded"
    args = ("-r", recipe_path, "--prompts", prompts, "--output", output, "--endpoint", server.url, *several)
    for number in (2, 0, 3):
        run_here("synth", "generate", *args, "--shard", f"{number}/4")
    early = run_here("synth", "merge", output, check=False)
    assert early.returncode == 2
    assert "found 3 of 4 shards, 00001-of-00004 not among them" in early.stderr
    run_here("synth", "generate", *args, "--shard", "1/4")
    printed = run_here("synth", "merge", output).stdout
    assert "merged 4 shards, 46 rows: 40 done, 2 truncated, 4 filtered" in printed
    for number in range(4):
        ids = [record.id for record in read_conversations(output / f"shards/0000{number}-of-00004")]
        assert ids
        assert {int(id_, 16) % 4 for id_ in ids} == {number}
        assert sorted(ids) == sorted(record.id for record in read_conversations(output, (number, 4)))
    merged = list(read_conversations(output))
    assert merged == whole  # in the order of the input
    one, many = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "out", output))
    assert one["settings"] == many["settings"]
    assert one["inputs"] == many["inputs"]
    assert {k: one["summary"][k] for k in one["summary"]} == {k: many["summary"][k] for k in one["summary"]}
    assert [r["index"] for r in read_lines(output / "rejects.jsonl")] == [20, 21]
    assert "is merged, skipped" in run_here("synth", "merge", output).stdout
    assert "is finished, skipped" in run_here("synth", "generate", *args).stdout
    beside = run_here("synth", "generate", *args, "--retry-failed", check=False)
    assert beside.returncode == 2
    assert "found shards, expected none in the output of a run without --shard" in beside.stderr
    assert read_record(*find_entry(output, whole[7].id)) == whole[7]


def test_a_run_that_goes_on_with_another_number_of_shards_loses_and_repeats_nothing(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [*shard_rows(), {"prompt": "slow"}]
    whole = generate(recipe_path, tmp_path, rows, server)
    output = tmp_path / "sharded"
    args = ("-r", recipe_path, "--prompts", tmp_path / "prompts.jsonl", "--output", output, "--endpoint", server.url)
    cut = int(whole[-1].id, 16) % 4
    ledger = output / f"shards/0000{cut}-of-00004/ledger.jsonl"
    assert kill_when(lambda: len(read_lines(ledger)) > 1, "synth", "generate", *args, "--shard", f"{cut}/4") == -9
    begun = len(read_lines(ledger))
    # As a kill leaves it between a record and its ledger line, and in the middle of a record.
    with (ledger.parent / FILE).open("a") as file:
        file.write(whole[-1].model_dump_json(exclude={"conversations"}) + '\n{"id":"torn')
    for shard in (f"{(cut + 1) % 4}/4", "0/3", "1/3", "2/3"):
        run_here("synth", "generate", *args, "--shard", shard)
    assert len(read_lines(ledger)) == begun
    parts = [(folder, (number, 3)) for number in range(3) for folder in find_part(output, (number, 3))]
    records = [record for folder, part in parts for record in read_conversations(folder, part)]
    assert sorted(record.id for record in records) == sorted(record.id for record in whole)
    held = (output / "shards/00001-of-00003/run.lock").open("a")
    fcntl.flock(held, fcntl.LOCK_EX)
    refused = run_here("synth", "generate", *args, "--shard", "0/5", check=False)
    assert "found a process at work on a shard of another number" in refused.stderr
    held.close()
    written = [line["index"] for path in output.glob("shards/*/ledger.jsonl") for line in read_lines(path)]
    assert sorted(written) == list(range(24))
    assert "merged 5 shards, 24 rows: 21 done, 1 truncated, 2 filtered" in run_here("synth", "merge", output).stdout
    assert list(read_conversations(output)) == whole
    shorter = output / "shards/00000-of-00003" / FILE
    shorter.write_bytes(shorter.read_bytes()[:-9])
    (output / "run.json").unlink()
    lost = run_here("synth", "merge", output, check=False)
    assert lost.returncode == 2
    assert "00000-of-00003/conversations.jsonl: found no whole record before byte" in lost.stderr


def test_a_shard_whose_failed_row_was_tried_again_is_merged_anew(recipe_path: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "fail 400"}])
    for healthy in (False, True):
        with scripted.serve() as server:
            server.healthy = healthy
            args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url)
            for shard in ("0/2", "1/2"):
                more = (*settings("synth.max_failed_fraction=1"), *(["--retry-failed"] if healthy else []))
                run_here("synth", "generate", *args, "--shard", shard, *more)
        printed = run_here("synth", "merge", tmp_path / "out").stdout
        assert ("2 done" if healthy else "1 done, 1 failed") in printed
    assert len(list(read_conversations(tmp_path / "out"))) == 2


def test_shards_of_other_prompts_are_not_merged(recipe_path: Path, tmp_path: Path, server: scripted.Server) -> None:
    for number in range(2):
        prompts = write(tmp_path / f"{number}.jsonl", [{"prompt": f"q{i}"} for i in range(4 + number)])
        args = ("-r", recipe_path, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url)
        run_here("synth", "generate", *args, "--shard", f"{number}/2")
    result = run_here("synth", "merge", tmp_path / "out", check=False)
    assert result.returncode == 2
    assert "inputs.prompts" in result.stderr


def test_a_shard_that_no_conversation_falls_into_is_finished_without_a_server(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    (record,) = generate(recipe_path, tmp_path, [{"prompt": "a"}], server)
    output = tmp_path / "sharded"
    for number in range(3):
        url = server.url if int(record.id, 16) % 3 == number else "http://127.0.0.1:9/v1"
        args = ("-r", recipe_path, "--prompts", tmp_path / "prompts.jsonl", "--output", output, "--endpoint", url)
        run_here("synth", "generate", *args, "--shard", f"{number}/3")
    assert "merged 3 shards, 1 rows: 1 done" in run_here("synth", "merge", output).stdout
    for number in range(3):
        args = ("-r", recipe_path, "--conversations", output, "--output", tmp_path / "store", "--backend", "hf")
        # The scripted replies are not the target's.
        printed = run_here("dump", "run", *args, "--shard", f"{number}/3", "--no-preflight").stdout
    assert "joined 3 shards" in printed


@pytest.mark.parametrize("shard", ["4/4", "1", "a/b", "-1/4"])
def test_a_shard_that_is_none_is_refused(recipe_path: Path, tmp_path: Path, shard: str) -> None:
    args = ("-r", recipe_path, "--prompts", "p.jsonl", "--output", tmp_path, f"--shard={shard}")
    result = run_here("synth", "generate", *args, check=False)
    assert result.returncode == 2
    assert "I/N" in result.stderr


def test_more_shards_than_files_may_be_open_are_merged(
    recipe_path: Path, tmp_path: Path, server: scripted.Server
) -> None:
    rows = [{"prompt": f"q{i}"} for i in range(40)]
    whole = generate(recipe_path, tmp_path, rows, server)
    one = tmp_path / "out"
    output, count = tmp_path / "sharded", 100
    records = {record.id: record for record in whole}
    entries = {line["id"]: line for line in read_lines(one / "ledger.jsonl")}
    state = json.loads((one / "run.json").read_text())
    for number in range(count):
        folder = output / f"shards/{number:05d}-of-{count:05d}"
        folder.mkdir(parents=True)
        lines, end = [], 0
        with (folder / FILE).open("wb") as file:
            for id_ in (id_ for id_ in records if int(id_, 16) % count == number):
                line = records[id_].model_dump_json(exclude={"conversations"}).encode() + b"\n"
                file.write(line)
                end += len(line)
                lines.append({**entries[id_], "size": len(line), "end": end})
        write(folder / "ledger.jsonl", lines)
        state["settings"]["shard"] = f"{number}/{count}"
        (folder / "run.json").write_text(json.dumps(state))
        shutil.copy(one / "resolved.yaml", folder)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (110, 110)); "
    code = f"{limit}from pathlib import Path; from synth.merge import merge; merge(Path({str(output)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(read_conversations(output)) == whole

"""Claims about a dump with servers: it waits for a lost one, stops at once, touches no file outside of its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import scripted
from conftest import ROOT, command, read_lines, run_here
from written import write_conversations

from common.errors import IncompleteError, UserError
from dump.run import dump
from recipe.load import load_recipe
from recipe.recipe import Recipe
from serve.command import Serving, build_command
from serve.extraction import extraction_args, to_server_args
from serve.server import find_port, run_server
from target.layers import captured_layers
from target.target import Target


def load(recipe_path: Path, url: str, folder: Path, *more: str) -> Recipe:
    keys = ["backend=server", f"endpoints=[{url}]", f"server_staging_dir={folder}", "backoff_s=0.05"]
    keys += ["preflight=false", *more]  # scripted states predict nothing
    return load_recipe(recipe_path, [f"dump.{key}" for key in keys])


def statuses(output: Path) -> Counter[str]:
    return Counter(line["status"] for line in read_lines(output / "ledger.jsonl"))


def start(folder: Path, port: int = 0) -> scripted.Server:
    folder.mkdir(exist_ok=True)
    server = scripted.Server(port)
    server.extract = folder
    return server


def test_a_lost_server_is_waited_for_and_costs_no_sample(
    recipe_path: Path, conversations: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, port = tmp_path / "staged", find_port("127.0.0.1", None)
    first = start(folder, port)
    first.num_answered = 20
    revived = []

    def replace() -> None:
        while statuses(tmp_path / "out")["done"] < 20:
            time.sleep(0.01)
        first.stop()
        time.sleep(1.0)
        revived.append(start(folder, port))

    thread = threading.Thread(target=replace)
    thread.start()
    dump(load(recipe_path, first.url, folder), conversations, tmp_path / "out")
    thread.join()
    revived[0].stop()
    assert statuses(tmp_path / "out") == {"done": 60}
    assert "is set aside" in (told := capfd.readouterr().out)
    assert "dump: " in told
    assert list(folder.iterdir()) == []


@pytest.mark.vllm
@pytest.mark.proves("extraction")
@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_vllm_server_that_is_killed_and_started_again_costs_no_sample(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    conversations = write_conversations(target_folder, tmp_path / "conversations", 300)
    recipe = load_recipe(recipe_path)
    target = Target.read(recipe.target.path)
    args = extraction_args(recipe, target, captured_layers(recipe.target, target), tmp_path / "staged")
    serving = Serving(extra_args=to_server_args(args))
    serve = build_command(recipe, target, port=find_port("127.0.0.1", None), serving=serving)
    url = f"http://127.0.0.1:{serve.port}/v1"
    slow = ("concurrency=4", "staging_gib=0.0002")  # captured samples wait for the ledger: the kill comes midway
    (tmp_path / "recipe.yaml").write_text(load(recipe_path, url, tmp_path / "staged", *slow).to_yaml())
    dump_args = ("-r", tmp_path / "recipe.yaml", "--conversations", conversations, "--output", tmp_path / "out")
    with run_server(serve, log_path=tmp_path / "1.log", startup_timeout_s=300) as server:
        process = subprocess.Popen(command("dump", "run", *dump_args), stdout=subprocess.PIPE, text=True, cwd=ROOT)
        while statuses(tmp_path / "out")["done"] < 50:
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    at_kill = statuses(tmp_path / "out")["done"]
    with run_server(serve, log_path=tmp_path / "2.log", startup_timeout_s=300):
        told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "is set aside until it is healthy again" in told
    assert at_kill < 300
    assert statuses(tmp_path / "out") == {"done": 300}
    assert "300 files whole" in run_here("dump", "verify", *dump_args[:2], "--store", tmp_path / "out").stdout


def test_servers_that_do_not_come_back_stop_the_dump_and_no_sample_fails_for_it(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    server = start(tmp_path / "staged")
    server.num_answered = 20

    def lose() -> None:
        while statuses(tmp_path / "out")["done"] < 20:
            time.sleep(0.01)
        server.stop()

    thread = threading.Thread(target=lose)
    thread.start()
    with pytest.raises(IncompleteError, match=r"no healthy server any more for 1 s \(dump.patience_s\)"):
        dump(load(recipe_path, server.url, tmp_path / "staged", "patience_s=1"), conversations, tmp_path / "out")
    thread.join()
    assert statuses(tmp_path / "out") == {"done": 20}


def test_a_sample_whose_file_is_torn_is_sent_again(recipe_path: Path, conversations: Path, tmp_path: Path) -> None:
    server = start(tmp_path / "staged")
    server.num_torn = 7
    dump(load(recipe_path, server.url, tmp_path / "staged"), conversations, tmp_path / "out")
    assert statuses(tmp_path / "out") == {"done": 60}
    assert len(server.requests) == 67
    server.stop()


def test_a_sample_fails_after_as_many_tries_as_the_recipe_says(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    server = start(tmp_path / "staged")
    server.num_torn = 1000
    recipe = load(recipe_path, server.url, tmp_path / "staged", "max_attempts=2", "max_reject_fraction=1")
    dump(recipe, conversations, tmp_path / "out")
    assert statuses(tmp_path / "out") == {"failed": 60}
    assert "(2 tries)" in read_lines(tmp_path / "out/ledger.jsonl")[0]["reason"]
    assert len(server.requests) == 120
    server.stop()


def test_a_dump_that_is_stopped_drops_what_is_in_flight_and_the_next_run_does_it(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    server = start(tmp_path / "staged")
    server.num_answered = 20
    recipe = load(recipe_path, server.url, tmp_path / "staged")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    args = ("-r", tmp_path / "recipe.yaml", "--conversations", conversations, "--output", tmp_path / "out")
    process = subprocess.Popen(command("dump", "run", *args), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        while server.in_flight < 40 or statuses(tmp_path / "out")["done"] < 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)  # the requests in flight are never answered
    finally:
        process.kill()
    assert process.returncode == 130
    assert "what was finished is kept" in told
    assert "Traceback" not in told
    assert list((tmp_path / "staged").iterdir()) == []
    server.num_answered = None
    dump(recipe, conversations, tmp_path / "out")
    assert statuses(tmp_path / "out") == {"done": 60}
    server.stop()


@pytest.mark.parametrize("manner", ["absolute", "parent", "symlink", "lock"])
def test_a_file_outside_of_the_servers_folder_is_refused_and_survives(
    recipe_path: Path, conversations: Path, tmp_path: Path, manner: str
) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "staged"
    secret.write_text("keep me")
    server = start(folder)
    named = {"absolute": secret, "parent": folder / "../secret"}.get(manner, folder / "link")
    if manner == "symlink":
        named.symlink_to(secret)
    if manner == "lock":
        Path(f"{named}.lock").symlink_to(secret)
    server.names = str(named)
    with pytest.raises(UserError, match=r"found hidden states in .*expected a file in .*dump.server_staging_dir"):
        dump(load(recipe_path, server.url, folder), conversations, tmp_path / "out")
    assert secret.read_text() == "keep me"
    assert not statuses(tmp_path / "out")
    server.stop()


def test_without_the_servers_folder_nothing_is_sent(recipe_path: Path, conversations: Path, tmp_path: Path) -> None:
    server = start(tmp_path / "staged")
    recipe = load_recipe(recipe_path, ["dump.backend=server", f"dump.endpoints=[{server.url}]"])
    with pytest.raises(UserError, match=r"dump\.server_staging_dir: found none"):
        dump(recipe, conversations, tmp_path / "out")
    assert not server.requests
    server.stop()

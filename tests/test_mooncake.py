"""Rolling stores whose samples are in the memory of Mooncake's clients."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_lines, run_here
from rolled import GIB, capture, follow, names, run_master, same_weights, store_bytes, write_whole
from written import write_conversations

from common.errors import UserError
from contracts.mooncake import Mooncake, MooncakeShelf
from contracts.rolling import RollingStore
from serve.server import find_port


@pytest.fixture(scope="module")
def conversations(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(target_folder, tmp_path_factory.mktemp("conversations"), 60)


@pytest.fixture(scope="module")
def whole(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(recipe_path, conversations, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def master() -> Iterator[str]:
    with run_master() as address:
        yield address


def test_an_object_of_other_content_than_was_put_is_refused(master: str) -> None:
    shelf, other = MooncakeShelf(Mooncake(master, "one")), MooncakeShelf(Mooncake(master, "one"), largest_bytes=1 << 20)
    shelf.put("a", b"content")
    assert (other.get("a"), other.get("b"), other.find(["a", "b"])) == (b"content", None, {"a"})
    shelf.put("a", b"other content")
    assert other.get("a") == b"other content"
    shelf._client.remove("one/a", True)
    shelf._client.put("one/a", bytes(32) + b"torn", shelf._pinned())
    with pytest.raises(UserError, match="not those that were put"):
        other.get("a")


def test_without_a_master_the_command_says_what_to_start(
    recipe_path: Path, conversations: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    mooncake = ("--mooncake", f"127.0.0.1:{find_port('127.0.0.1', None)}")
    result = run_here(*names(capture(recipe_path, conversations, tmp_path, 0.01, *mooncake)), check=False)
    assert result.returncode == 2
    assert "Start it: mooncake_master" in result.stderr


def test_an_object_that_is_put_anew_while_it_is_read_is_read_again(
    master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = MooncakeShelf(Mooncake(master, "torn"))
    shelf.put("a", b"whole")
    whole = shelf._client.get("torn/a")
    answers = iter([bytes(32) + b"half new, half old", whole])
    monkeypatch.setattr(MooncakeShelf, "_client", SimpleNamespace(get=lambda _: next(answers)))
    assert shelf.get("a") == b"whole"


@pytest.mark.long
def test_memory_of_other_nodes_gives_the_same_weights_after_a_capture_server_was_killed(
    recipe_path: Path, conversations: Path, whole: Path, tmp_path: Path, master: str
) -> None:
    window = 0.3 * store_bytes(whole / "store")
    where = ("--mooncake", master, "--mooncake-name", "weights")
    store = RollingStore(tmp_path / "trainer/store")
    captures = [
        capture(recipe_path, conversations, tmp_path / f"node-{number}", window / GIB, "--shard", f"{number}/2", *where)
        for number in range(2)
    ]
    with (tmp_path / "log").open("w") as log:
        start = partial(subprocess.Popen, cwd=ROOT, stdout=log, stderr=log)
        trainer = start(follow(recipe_path, tmp_path / "trainer", *where))
        nodes = [start(words) for words in captures]
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "trainer/draft/metrics.jsonl").exists() or not read_lines(
                tmp_path / "trainer/draft/metrics.jsonl"
            ):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                assert trainer.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)
            nodes[0].kill()  # its samples are gone with its memory
            nodes[0].wait()
            nodes[0] = start(captures[0])
            assert [process.wait(300) for process in (trainer, *nodes)] == [0, 0, 0], (tmp_path / "log").read_text()
        finally:
            for process in (trainer, *nodes):
                process.kill()
                process.wait()
    assert same_weights(tmp_path / "trainer", whole)
    assert not list(store.folder.rglob("*.safetensors"))

"""Claims about the hub: an export is pushed, fetched at a commit, and used as a folder is; no token is written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cited import Cited
from conftest import run_here
from hub import TOKEN, Hub, serve_hub, use_hub
from huggingface_hub import close_session, constants

from common.errors import UserError
from common.hub import parse_reference, revision_of
from contracts.certificate import read_certificate
from drafts.published import find_draft
from recipe.load import load_recipe
from serve.command import draft_inputs
from target.target import Target


@pytest.fixture(scope="module")
def cited(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Cited:
    found = Cited(tmp_path_factory.mktemp("cited"), recipe_path, Target.read(target_folder))
    found.export("export")
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        yield hub
    close_session()


def push(cited: Cited, *words: object, repo: str = "org/draft") -> Any:
    args = ["--output", cited.folder / "export", "--push", repo, *words]
    return run_here("train", "export", *args, check=False)


def test_a_pushed_export_is_private_and_its_snapshot_is_what_the_certificate_says(cited: Cited, hub: Hub) -> None:
    result = push(cited)
    assert result.returncode == 0, result.stderr
    repository = hub.repositories["org/draft"]
    assert repository.private
    assert f"-> org/draft@{repository.head} (certificate " in result.stdout
    digest = read_certificate(cited.folder / "export")[0].digest
    assert repository.messages == [f"{Path(cited.target.path).name}-dflash, certificate {digest[:12]}"]
    checked = run_here("train", "export", "--check", "org/draft@main")
    assert digest in checked.stdout
    assert f"org/draft@main is {repository.head}" in checked.stderr


def test_a_broken_push_goes_on_where_it_ended_and_a_finished_one_sends_nothing(cited: Cited, hub: Hub) -> None:
    hub.refuse = lambda request: request.startswith("PUT")
    broken = push(cited)
    assert (broken.returncode, "found a broken upload" in broken.stderr) == (1, True)
    assert "Traceback" not in broken.stderr
    hub.log.clear()
    hub.refuse = lambda request: "/commit/" in request
    broken = push(cited)
    assert (broken.returncode, "found HTTP status 400 from the hub" in broken.stderr) == (2, True)
    assert len(hub.sent("^PUT /lfs/")) == 1  # the weights are there
    hub.refuse = lambda _: False
    assert push(cited).returncode == 0
    assert len(hub.sent("^PUT /lfs/")) == 1
    hub.log.clear()
    assert push(cited).returncode == 0
    assert hub.sent("^PUT|/commit/") == []
    assert len(hub.repositories["org/draft"].commits) == 2


def test_weights_of_an_earlier_push_are_deleted_and_other_files_stay(cited: Cited, hub: Hub) -> None:
    assert push(cited).returncode == 0
    repository = hub.repositories["org/draft"]
    repository.commit({**repository.commits[repository.head], "old.safetensors": b"x", "LICENSE": b"y"}, "by hand")
    assert push(cited).returncode == 0
    files = repository.commits[repository.head]
    assert ("old.safetensors" in files, "LICENSE" in files) == (False, True)


def test_a_public_repository_takes_only_a_push_that_says_so(cited: Cited, hub: Hub) -> None:
    assert push(cited, "--public").returncode == 0
    assert not hub.repositories["org/draft"].private
    hub.log.clear()
    assert "found a public repository, expected a private one" in push(cited).stderr
    assert hub.sent("^PUT|/commit/") == []


def test_a_changed_export_is_not_pushed(cited: Cited, hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(cited.folder / "export", tmp_path / "export")
    (folder / "config.json").write_text("{}")
    result = run_here("train", "export", "--output", folder, "--push", "org/draft", check=False)
    assert (result.returncode, hub.log) == (1, [])
    assert "config.json: sha256" in result.stdout


@pytest.mark.parametrize("repo", ["draft", "org/a/b", "org/a--b", "org/.a", "../a", "org/a b"])
def test_a_name_that_the_hub_would_refuse_is_refused_before_a_request(cited: Cited, hub: Hub, repo: str) -> None:
    result = push(cited, repo=repo)
    assert (result.returncode, hub.log) == (2, [])
    assert "expected the name of a repository on the hub" in result.stderr
    with pytest.raises(UserError, match="expected the name of a repository"):
        parse_reference(f"{repo}@main")


def test_the_token_is_sent_and_neither_written_nor_printed(cited: Cited, hub: Hub, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(cited.recipe_path.read_text().replace("\nsynth:", f"\n  env: {{HF_TOKEN: {TOKEN}}}\nsynth:"))
    args = ["--recipe", recipe, "--set", f"serve.args.api-key={TOKEN}", "--run", cited.run, "--store", cited.store]
    result = run_here("train", "export", *args, "--output", tmp_path / "export", "--push", "org/draft")
    assert hub.repositories["org/draft"].private  # the server saw the token
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != recipe]
    assert len(written) > 4
    files = hub.repositories["org/draft"].commits[hub.repositories["org/draft"].head]
    for text in (*(path.read_bytes() for path in written), *files.values()):
        assert TOKEN.encode() not in text
    assert TOKEN not in result.stdout + result.stderr
    (tmp_path / "export/LICENSE").write_text(f"token: {TOKEN}")
    refused = run_here("train", "export", "--output", tmp_path / "export", "--push", "org/draft", check=False)
    assert "LICENSE: found the hub's token in it" in refused.stderr
    assert TOKEN not in refused.stdout + refused.stderr


def test_without_a_login_or_without_network_one_line_says_so(
    cited: Cited, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert push(cited).returncode == 0
    use_hub(monkeypatch, hub.url, tmp_path / "other", token=None)
    for result, told in (
        (push(cited), "found no right to do this from the hub"),
        (run_here("train", "export", "--check", "org/draft@main", check=False), "set HF_TOKEN or run `hf auth login`"),
    ):
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert told in result.stderr
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # of the hub's client, before it tries again
    for draft in ("org/draft@main", f"org/draft@{'1' * 40}"):
        with pytest.raises(
            UserError, match=r"no network, or the hub does not answer.*hf download org/draft --revision"
        ):
            find_draft(draft)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        find_draft("org/draft@main")


def test_a_reference_is_resolved_to_one_commit_and_recorded(
    cited: Cited, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert push(cited).returncode == 0
    pinned = f"org/draft@{hub.repositories['org/draft'].head}"
    evaluate = ["train", "eval", *cited.recipe, "--store", cited.store, "--output"]
    run_here(*evaluate, tmp_path / "eval.json", "--draft", "org/draft@main")
    inputs = json.loads((tmp_path / "eval.json").read_text())["inputs"]
    assert inputs["draft_revision"] == pinned
    start = ["train", "offline", *cited.recipe, "--store", cited.store, "--set", "train.num_steps=1"]
    run_here(*start, "--set", "train.init_from=org/draft@main", "--output", tmp_path / "run")
    assert json.loads((tmp_path / "run/run.json").read_text())["inputs"]["init_from_revision"] == pinned
    served = run_here("serve", "command", *cited.recipe, "--draft", "org/draft@main", "--format", "json").stdout
    snapshot = find_draft(pinned)
    assert str(snapshot) in served
    assert revision_of(snapshot) == pinned
    docker = run_here("serve", "command", *cited.recipe, "--draft", pinned, "--format", "docker").stdout
    assert f"-v {snapshot.parent.parent}:{snapshot.parent.parent}:ro" in docker  # snapshots are links into it
    recorded = draft_inputs(load_recipe(cited.recipe_path), snapshot)
    assert recorded == {"draft": cited_fingerprint(cited), "draft_revision": pinned}
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # no network: what is in the cache is used
    assert find_draft("org/draft@main") == find_draft(pinned) == snapshot


def cited_fingerprint(cited: Cited) -> str:
    return draft_inputs(load_recipe(cited.recipe_path), cited.folder / "export")["draft"]


def test_a_folder_here_comes_before_the_hub_and_a_mistyped_path_downloads_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/draft@main", "org/draft"):
        Path(name).mkdir(parents=True)
        assert find_draft(name) == Path(name)
    assert find_draft("runs/exprot") == Path("runs/exprot")
    assert hub.log == []
    with pytest.raises(UserError, match="no such repository that this login may see"):
        find_draft("org/none@main")
    for text in ("org/draft2@", "org/draft2@../../x", "org/draft2@-a b"):
        with pytest.raises(UserError, match="expected a branch, a tag"):
            find_draft(text)


def test_a_push_through_xet_stores_the_weights_and_commits_their_checksum(
    cited: Cited, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """hf_xet's own storage in a folder, in place of the hub's."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.cas = f"local://{tmp_path / 'cas'}"
    result = push(cited)
    assert result.returncode == 0, result.stderr
    assert hub.sent("xet-write-token")
    assert sum(path.stat().st_size for path in (tmp_path / "cas").rglob("*") if path.is_file()) > 1000

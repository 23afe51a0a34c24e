"""Claims about the page of a run: what it shows, in a real browser, and that text of the data is never markup."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import run_here
from playwright.sync_api import Browser, Page
from run_folder import RunFolder, fill

from distributed.charts import Line, draw, find_ticks
from distributed.logs import MAX_POINTS, Curves
from distributed.page import PageWriter
from distributed.stage import RunReader

ATTACK = "</title><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


def write_figures(folder: RunFolder) -> None:
    figures = {"acceptance_length": 2.5, "per_position": [0.8, 0.5, 0.2], "interval": [2.4, 2.6], "walks": [[1]]}
    (folder.path / "eval.json").write_text(json.dumps(figures))
    folder.begin("bench")
    speeds = {"baseline_tokens_per_s": {"1": 100.0}, "by_draft_tokens": {"3": {"tokens_per_s": {"1": 150.0}}}}
    (folder.path / "bench/acceptance.json").write_text(json.dumps({**figures, **speeds}))
    folder.stop("bench", turns=3)


def write_page(folder: RunFolder, every_s: float | None = None) -> Path:
    page = folder.path / "status.html"
    PageWriter(folder.path, page, every_s).write(RunReader(folder.path).read(), every_s is not None)
    return page


def open_page(chromium: Browser, path: Path, **options: object) -> tuple[Page, list[str], list[str]]:
    page = chromium.new_page(**{"viewport": {"width": 1200, "height": 800}, **options})
    requests, errors = list[str](), list[str]()
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    return page, requests, errors


def test_a_page_shows_stages_curves_figures_failures_and_commands_on_any_screen(
    folder: RunFolder, chromium: Browser
) -> None:
    write_figures(fill(folder))
    path = write_page(folder)
    page, requests, errors = open_page(chromium, path)
    states = page.locator("#stages tr[class]").evaluate_all("rows => rows.map(row => row.className)")
    assert states == ["done", "done", "running", "failed", "running", "waiting", "done"]
    assert page.locator("#steps li").all_inner_texts()[0] == "synth\ndone"
    assert "3 of about 7 rows" in page.inner_text("#stages")
    shares = page.locator("#stages progress").evaluate_all("all => all.map(one => one.value)")
    assert [round(share, 2) for share in shares] == [1, 1, 0.43, 0, 0.3]
    assert page.locator("figure figcaption").all_inner_texts() == [
        "loss by step", "accuracy of draft token by step", "acceptance length by step", "learning rate by step",
        "acceptance rate by draft token",
    ]  # fmt: skip
    assert page.locator("svg polyline").evaluate_all("all => all.every(line => line.getBBox().width > 100)")
    assert "predicted: eval (length 2.500)" in page.inner_text(".charts figure:has-text('acceptance rate')")
    assert page.locator("td", has_text="1.50x").count() == 1
    assert page.locator("#failed td:visible", has_text="HTTP 500 after N tries").count() == 1
    assert any(text.endswith("--retry-failed") for text in page.locator("pre").all_inner_texts())
    assert "1 failed row, with" in page.inner_text("#warnings")
    page.close()
    for scheme, background in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 24, 27)")):
        page, more, problems = open_page(
            chromium, path, viewport={"width": 360, "height": 700}, color_scheme=scheme
        )  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        page.close()
        requests, errors = requests + more, errors + problems
    assert set(requests) == {path.as_uri()}
    assert errors == []


def test_a_page_reloads_while_it_is_rewritten_and_says_when_nobody_rewrites_it(
    folder: RunFolder, chromium: Browser
) -> None:
    folder.begin("synth")
    page, _, errors = open_page(chromium, write_page(folder, every_s=0.2))
    assert not page.is_visible("#stale")
    page.locator("#files summary").first.click()  # closes what is open at first
    folder.write_rows("synth", "done", "done")
    write_page(folder, every_s=0.2)
    page.wait_for_selector("#stages td:has-text('2 done')")
    folder.stop("synth", done=2)
    path = write_page(folder)
    page.wait_for_selector("h1 .chip.done")
    path.write_text(
        re.sub(r'data-written="\d+" data-reload-s="0"', 'data-written="1" data-reload-s="60"', path.read_text())
    )
    page.reload()
    assert "its `distributed status --watch` has ended" in page.inner_text("#stale")
    assert errors == []
    page.close()


def test_text_of_the_data_is_shown_and_never_run(folder: RunFolder, chromium: Browser) -> None:
    hostile = ATTACK.replace("/", "\N{DIVISION SLASH}")  # a file's name has no slash
    folder.begin("synth", f"synth generate --output {ATTACK}", name=ATTACK)
    folder.write_rows("synth", "failed", "filtered", reason=ATTACK)
    (folder.path / "synth" / hostile).write_text("")
    (folder.path / "synth" / "javascript:alert(1)").write_text("")
    folder.stop("synth")
    folder.begin("draft")
    state = json.loads((folder.path / "draft/run.json").read_text())
    (folder.path / "draft/run.json").write_text(json.dumps({**state, "stage": ATTACK}))
    (folder.path / f"eval-{hostile}.json").write_text('{"acceptance_length": 2.0, "per_position": [0.5]}')
    path = write_page(folder)
    html = path.read_text()
    assert html.count("<script>") == 1
    assert "<img" not in html
    page, requests, errors = open_page(chromium, path)
    assert page.title() == "run"  # the folder's name
    page.evaluate("document.title = 'unchanged'")
    assert ATTACK in page.inner_text("#failed table")
    assert page.locator("small", has_text=ATTACK).count() == 1
    links = page.locator("#files a").evaluate_all("all => all.map(link => link.getAttribute('href'))")
    assert all(link.startswith("./") and ":" not in link for link in links)
    assert {unquote(link) for link in links} >= {f"./synth/{hostile}", "./synth/javascript:alert(1)"}
    page.wait_for_timeout(50)
    assert page.title() == "unchanged"
    assert (requests, errors) == ([path.as_uri()], [])
    page.close()


def test_the_files_of_a_page_elsewhere_are_linked_relative_to_it(folder: RunFolder, tmp_path: Path) -> None:
    folder.begin("synth")
    folder.write_rows("synth", "done")
    page = tmp_path / "pages/a.html"
    run_here("distributed", "status", folder.path, "--output", page)
    links = re.findall(r'href="([^"]+)"', page.read_text())
    assert "./../run/synth/ledger.jsonl" in links
    assert all((page.parent / unquote(link)).is_file() for link in links)


def test_a_loss_that_is_no_number_is_a_gap_and_a_warning(folder: RunFolder) -> None:
    folder.begin("draft")
    folder.write_steps("draft", 10, 20)
    folder.write_steps("draft", 30, loss=float("nan"))
    folder.write_steps("draft", 40)
    html = write_page(folder).read_text()
    assert "the loss is no number since step 30" in html
    assert "nan" not in html.split("<svg")[1].split("</svg>")[0]
    chart = draw("t", "x", [Line("a", [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0), (5, 3.0)])])
    assert chart is not None
    assert [len(part.split()) for part in chart.paths[0].parts] == [1, 2]
    assert draw("t", "x", [Line("a", [(1, float("nan"))])]) is None


def test_curves_of_a_long_training_keep_a_bounded_number_of_points_and_its_ends(folder: RunFolder) -> None:
    folder.begin("draft")
    folder.write_steps("draft", *range(1, 3 * MAX_POINTS))
    curves = Curves(folder.path / "draft/metrics.jsonl")
    curves.update()
    assert MAX_POINTS / 2 <= len(curves.points) <= MAX_POINTS + 1
    assert (curves.points[0].step, curves.points[-1].step) == (1, 3 * MAX_POINTS - 1)
    page = write_page(folder)
    assert page.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.34, 1.34, [0, 0.5, 1, 1.5]), 
        (0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]), (10, 800, [0, 200, 400, 600, 800]),
        (3, 3, [3, 4, 5, 6]), (0, 0, [0, 0.5, 1]), (-2, -1, [-2, -1.5, -1]),
    ],
)  # fmt: skip
def test_ticks_are_round_numbers_that_span_the_values(low: float, high: float, ticks: list[float]) -> None:
    found = find_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(ticks[: len(found)] if low != high else found)
    assert 2 <= len(found) <= 6


def test_a_page_of_a_million_rows_is_rewritten_without_reading_them_again(folder: RunFolder) -> None:
    folder.begin("synth")
    ledger = folder.path / "synth/ledger.jsonl"
    ledger.write_bytes(b"".join(b'{"id": "%032x", "status": "done"}\n' % number for number in range(20_000)))
    reader = RunReader(folder.path)
    assert reader.read()[0].rows == 20_000
    with ledger.open("r+b") as file:
        file.write(b"x" * (ledger.stat().st_size - 1))
    folder_stage = reader.read()[0]
    assert (folder_stage.rows, folder_stage.warnings) == (20_000, ())
    assert time.time() - folder_stage.changed < 60

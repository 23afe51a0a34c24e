"""Size and times of a page of `synth browse` / `dump browse` in headless Chromium, with a draft's steps.

Limit: the same bytes as a page that does nothing. Premise: the page has all rows, and a search finds the planted one.

    python benchmarks/browse_page.py --conversations runs/smollm2/synth/train
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

from contracts.conversation import read_conversations
from target.browse import Browser, Part, Row

REPEATS = 3
NUM_DRAFT_TOKENS = 3
PLANTED = "row-planted"


def make_steps(ids: list[int], start: int, generator: random.Random) -> np.ndarray:
    """Steps of a draft whose wrong tokens are drawn from the row: a real draft's are such, too."""
    steps, place = [], start
    while place < len(ids) - NUM_DRAFT_TOKENS - 1:
        accepted = generator.randint(0, NUM_DRAFT_TOKENS)
        wrong = generator.choices(ids, k=NUM_DRAFT_TOKENS - accepted)
        steps.append([place, accepted, *ids[place + 1 : place + 1 + accepted], *wrong])
        place += accepted + 1
    return np.array(steps, dtype=np.int32)


def write(path: Path, conversations: Path, target: Path | None, num_rows: int, num_tokens: int) -> None:
    """Write a page of `num_rows` rows, each with `num_tokens` tokens of conversations that follow one another."""
    records = list(read_conversations(conversations))
    generator = random.Random(0)
    draft = f"a random one, K = {NUM_DRAFT_TOKENS}"
    browser = Browser("benchmark", "samples", target or Path(records[0].target["path"]), draft)
    for number in range(num_rows):
        ids: list[int] = []
        while len(ids) < num_tokens:
            ids += generator.choice(records).samples[0].token_ids
        start, ids = min(60, num_tokens - 1), ids[:num_tokens]
        label = PLANTED if number == num_rows * 9 // 10 else f"row-{number}"
        part = Part("", ids, [(start, num_tokens)], make_steps(ids, start, generator))
        browser.add(Row(f"{number:032x}", label, {"category": f"kind {number % 10}"}, {}, [part]))
    browser.write(path)


def search(page: Page, query: str) -> float:
    """Return the seconds of a search."""
    number = int(page.evaluate("document.body.dataset.searched")) + 1
    started = time.perf_counter()
    page.fill("#query", query)
    page.wait_for_selector(f"body[data-searched='{number}']")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=Path, required=True, help="output of `synth generate`")
    parser.add_argument("--target", type=Path, help="the target's folder, if it has moved")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path, idle = Path(folder) / "page.html", Path(folder) / "idle.html"
        started = time.process_time()
        write(path, args.conversations, args.target, args.rows, args.tokens)
        print(f"{args.rows} rows of {args.tokens} tokens: written in {time.process_time() - started:.0f} s of CPU time")
        print(f"size: {path.stat().st_size / 1e6:.1f} MB")
        html = re.sub(r"(?s)<script>.*</script>|<meta http-equiv[^>]*>", "", path.read_text())
        idle.write_text(
            html.replace("</body>", "<script>document.body.dataset.ready = performance.now()</script></body>")
        )
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        times: dict[str, list[float]] = {
            "opened": [],
            "the same bytes alone": [],
            "first search": [],
            "next search": [],
        }
        for _ in range(REPEATS):
            for name, file in (("opened", path), ("the same bytes alone", idle)):
                page = chromium.new_page()
                page.goto(file.as_uri())
                page.wait_for_selector("body[data-ready]", state="attached", timeout=120_000)
                times[name].append(float(page.evaluate("document.body.dataset.ready")) / 1000)
                if file is path:
                    times["first search"].append(search(page, "no such text in any row"))
                    times["next search"].append(search(page, PLANTED))
                    found = page.inner_text("#count")
                    assert found.startswith(f"1 of {args.rows:,} samples"), found
                    heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
                page.close()
        for name, values in times.items():
            print(f"{name}: {statistics.median(values):.2f} s")
        ratio = statistics.median(times["opened"]) / statistics.median(times["the same bytes alone"])
        print(f"ratio of opening to the limit: {ratio:.1f}; JavaScript heap after the searches: {heap:.0f} MB")


if __name__ == "__main__":
    main()

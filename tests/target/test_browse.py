"""Claims about the page that shows conversations and samples, as a real browser runs it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from page_data import unpack
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import UserError
from target.browse import Browser, Part, Row, spread

WORDS = [
    "the",
    "target",
    "of",
    "a",
    "draft",
    "accepts",
    "tokens",
    "when",
    "its",
    "own",
    "words",
    "are",
    "not",
    "those",
    "that",
    "follow",
    "after",
    "it",
]
ATTACK = "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
NUM_ROWS = 10_000
LONG = 5_000  # the row with many tokens
PLANTED = 9_876


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("target")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.folder = folder
    return tokenizer


def draw_text(generator: random.Random, num_words: int) -> str:
    return "".join(" " + generator.choice(WORDS) for _ in range(num_words))


@pytest.fixture(scope="module")
def many(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 10,000 rows; one has many tokens, one a planted text and another finish reason."""
    browser = Browser("10,000 rows", "samples", tokenizer.folder)
    generator = random.Random(0)
    replies = [tokenizer.encode(draw_text(generator, 40)).ids for _ in range(50)]
    for number in range(NUM_ROWS):
        ids = tokenizer.encode(f"<|user|>Question {number}?\n").ids
        start = len(ids)
        ids += generator.choice(replies)
        if number == LONG:
            ids += tokenizer.encode(draw_text(generator, 30_000)).ids
        if number == PLANTED:
            ids += tokenizer.encode(" The Needle is here.").ids
        facets = {
            "thinking mode": ("enabled", "disabled")[number % 2],
            "category": f"kind {number % 5}",
            "finish reason": "length" if number == PLANTED else "stop",
            "loop": "yes" if number % 1000 == 7 else "no",
        }
        browser.add(Row(f"{number:032x}", f"row-{number}", facets, {}, [Part("", ids, [(start, len(ids))])]))
    path = tmp_path_factory.mktemp("many") / "page.html"
    browser.write(path)
    return path


@dataclass
class Opened:
    """A page in a browser, and what it loaded and complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def wait_for_search(self, number: int) -> None:
        self.page.wait_for_selector(f"body[data-searched='{number}']")

    def token(self, text: str, nth: int = 0) -> object:
        return self.page.locator(".section > span", has_text=re.compile(f"^{re.escape(text)}$")).nth(nth)


def open_page(chromium: Chromium, path: Path, fragment: str = "", **options: object) -> Opened:
    opened = Opened(chromium.new_page(**{"viewport": {"width": 1200, "height": 800}, **options}))
    opened.page.set_default_timeout(60_000)
    opened.page.on("requestfinished", lambda request: opened.requests.append(request.url))
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.page.on("console", lambda message: opened.errors.append(message.text))
    opened.page.goto(path.as_uri() + fragment)
    opened.page.wait_for_selector("body[data-ready]")
    return opened


def test_ten_thousand_rows_are_paged_filtered_sorted_and_searched(many: Path, chromium: Chromium) -> None:
    opened = open_page(chromium, many)
    page = opened.page
    assert "10,000 samples" in page.inner_text("#count")
    assert page.inner_text("#page") == "page 1 of 200"
    assert page.locator("#list li").count() == 50
    page.click("#next")
    assert page.inner_text("#page") == "page 2 of 200"
    assert opened.texts("#list .label")[0] == "row-50"
    page.fill("#query", "NEEDLE is")
    opened.wait_for_search(2)
    assert opened.texts("#list .label") == [f"row-{PLANTED}"]
    assert "".join(opened.texts(".hit")).strip() == "Needle is"
    assert opened.texts("#list .tag.warn") == ["length"]
    page.fill("#query", "")
    opened.wait_for_search(3)
    page.select_option("select[data-name='loop']", label="yes (10)")
    opened.wait_for_search(4)
    assert opened.texts("#list .label") == [f"row-{number}" for number in range(7, NUM_ROWS, 1000)]
    page.select_option("select[data-name='thinking mode']", label="enabled (5000)")
    opened.wait_for_search(5)
    assert opened.texts("#list li") == ["No row matches. Change the search or the filters."]
    page.click("#reset")
    opened.wait_for_search(6)
    page.fill("#min", "10000")
    opened.wait_for_search(7)
    assert opened.texts("#list .label") == [f"row-{LONG}"]
    page.fill("#min", "")
    opened.wait_for_search(8)
    page.select_option("#sort", "tokens, most")
    opened.wait_for_search(9)
    assert opened.texts("#list .label")[0] == f"row-{LONG}"
    assert opened.errors == []
    assert opened.requests == [many.as_uri()]
    page.close()


def test_keys_lead_through_rows_pages_search_and_tokens(many: Path, chromium: Chromium) -> None:
    opened = open_page(chromium, many)
    page = opened.page
    for key in ("]", "]", "j", "j", "k"):
        page.keyboard.press(key)
    page.wait_for_selector("body[data-row='100']")
    assert page.inner_text("#page") == "page 3 of 200"
    assert page.get_attribute("#list", "aria-activedescendant") == "row-100"
    for _ in range(2):
        page.keyboard.press("k")
    page.wait_for_selector("body[data-row='98']")
    assert page.inner_text("#page") == "page 2 of 200"
    page.keyboard.press("/")
    page.keyboard.type("needle")
    opened.wait_for_search(2)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.wait_for_selector(f"body[data-row='{PLANTED}']")
    page.keyboard.press("t")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#card code") == '"<|user|>"'
    assert "special, not in the loss" in page.inner_text("#card")
    page.keyboard.press("ArrowRight")
    assert "token 1, id" in page.inner_text("#card")
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.click("#keys button")
    assert not page.is_visible("#keys")
    assert opened.errors == []
    page.close()


def test_a_row_of_very_many_tokens_is_shown_whole(many: Path, chromium: Chromium) -> None:
    opened = open_page(chromium, many, f"#id={LONG:032x}")
    opened.page.wait_for_selector(f"body[data-row='{LONG}']")
    index, rows = unpack(many)
    ((_, pieces, _, _),) = rows[LONG][1]
    assert len(pieces) > 30_000
    assert opened.page.locator(".section > span").count() == len(pieces)
    assert opened.page.locator(".section").count() > 5
    shown = opened.page.evaluate("document.querySelector('.tokens').textContent").replace("↵", "")
    assert shown == "".join(index["texts"][piece] for piece in pieces)
    opened.page.close()


def test_the_address_holds_row_and_filters(many: Path, chromium: Chromium) -> None:
    opened = open_page(chromium, many)
    page = opened.page
    page.select_option("select[data-name='category']", label="kind 3 (2000)")
    opened.wait_for_search(2)
    page.locator("#list li").nth(4).click()
    page.wait_for_selector("body[data-row='23']")
    again = open_page(chromium, many, page.url.removeprefix(many.as_uri()))
    assert "2,000 of 10,000 samples" in again.page.inner_text("#count")
    assert again.texts("#list li[aria-selected='true'] .label") == ["row-23"]
    again.page.close()
    page.close()


def make_walked(tokenizer: Tokenizer, folder: Path, text: str = " accepts tokens when its own words") -> Path:
    """A page of one sample with the steps of a draft of two tokens; `text` has its reply's tokens."""
    prompt = tokenizer.encode("<|user|>Why?\n").ids
    reply = tokenizer.encode(text).ids
    first = len(prompt)
    token = dict(enumerate(prompt + reply))
    wrong = tokenizer.token_to_id("<|user|>")
    steps = [[first, 1, token[first + 1], wrong], [first + 2, 2, token[first + 3], token[first + 4]]]
    path = folder / "page.html"
    browser = Browser("walked", "samples", tokenizer.folder, draft="runs/draft, K = 2")
    part = Part("", prompt + reply, [(first, first + len(reply))], np.array(steps, dtype=np.int32))
    browser.add(Row("0" * 32, "walked", {"finish reason": "stop"}, {}, [part]))
    browser.write(path)
    return path


def test_tokens_are_coloured_by_the_draft_or_by_the_mask_with_proposals_on_hover(
    tokenizer: Tokenizer, chromium: Chromium, tmp_path: Path
) -> None:
    opened = open_page(chromium, make_walked(tokenizer, tmp_path))
    page = opened.page
    classes = [
        value or "" for value in page.locator(".section > span").evaluate_all("all => all.map(e => e.className)")
    ]
    reply = [value.split()[0] for value in classes if value and value != "special"]
    assert reply == ["first", "accepted", "wrong", "accepted", "accepted", "bonus"]
    assert classes[0] == "special"
    assert "2 steps, acceptance length 2.50" in page.inner_text("#tools")
    assert "acceptance length 2.500" in page.inner_text("#count")
    page.locator(".section > span.wrong").hover()
    assert "Step 1 of 2: draft token 2 was wrong; this is the target's." in page.inner_text("#card")
    chips = page.locator("#card .chip").evaluate_all("all => all.map(e => e.className)")
    assert chips == ["chip accepted", "chip wrong"]
    assert page.locator("#card .chip").nth(1).inner_text().startswith("<|user|>")
    page.locator(".section > span.bonus").hover()
    assert "Step 2 of 2: the target's token after all 2 draft tokens." in page.inner_text("#card")
    page.locator(".section > span.first").hover()
    assert "First token of the reply" in page.inner_text("#card")
    page.keyboard.press("c")
    assert page.locator(".section > span.accepted").count() == 0
    assert page.locator(".section > span.marked").count() == 6
    assert opened.errors == []
    page.close()


def test_text_of_the_data_is_shown_and_never_run(tokenizer: Tokenizer, chromium: Chromium, tmp_path: Path) -> None:
    ids = tokenizer.encode(ATTACK).ids
    browser = Browser(ATTACK, ATTACK, tokenizer.folder, draft=ATTACK)
    for _ in range(2):
        facets = {"category": ATTACK, ATTACK: ATTACK, "loop": "no"}
        browser.add(Row(ATTACK, ATTACK, facets, {ATTACK: ATTACK}, [Part(ATTACK, ids, [(1, len(ids))])]))
    browser.add(Row("other", "other", {"category": "plain"}))
    browser.write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "<img" not in html
    assert html.count("<script>") == 1
    opened = open_page(chromium, tmp_path / "page.html")
    page = opened.page
    assert "".join(opened.texts(".section > span")) == ATTACK
    page.locator(".section > span").nth(5).hover()
    page.fill("#query", "<img")
    opened.wait_for_search(2)
    assert page.locator("img").count() == 0
    assert page.title() == ATTACK
    # The policy holds even for markup that a page would let in.
    page.evaluate("text => { document.body.insertAdjacentHTML('beforeend', text) }", ATTACK)
    page.wait_for_timeout(100)
    assert page.title() == ATTACK
    assert opened.requests == [(tmp_path / "page.html").as_uri()]
    page.close()


def test_invisible_characters_are_shown(tokenizer: Tokenizer, chromium: Chromium, tmp_path: Path) -> None:
    ids = tokenizer.encode("a\tb\u202ec\n").ids
    browser = Browser("signs", "samples", tokenizer.folder)
    browser.add(Row("0" * 32, "signs", {}, {}, [Part("", ids, [])]))
    browser.write(tmp_path / "page.html")
    opened = open_page(chromium, tmp_path / "page.html")
    assert opened.texts(".section .sign") == ["⇥", "‹U+202E›", "↵"]
    opened.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_list_or_row_without_scrolling_sideways(
    many: Path, chromium: Chromium, scheme: str
) -> None:
    opened = open_page(chromium, many, viewport={"width": 360, "height": 700}, color_scheme=scheme)
    page = opened.page
    assert page.is_visible("#list")
    assert not page.is_visible("#row")
    page.locator("#list li").nth(2).click()
    page.wait_for_selector("body.reading[data-row='2']")
    assert page.is_visible("#row")
    assert not page.is_visible("#list")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#row").evaluate("row => row.scrollWidth <= row.clientWidth")
    page.locator(".section > span").nth(3).click()
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 24, 27)"}[scheme]
    page.click("#back")
    assert page.is_visible("#list")
    page.close()


def test_a_page_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no rows"):
        Browser("empty", "samples", None).write(tmp_path / "page.html")


def test_a_limit_takes_rows_from_everywhere() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == spread(range(3), None) == [0, 1, 2]

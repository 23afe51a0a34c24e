"""Claims about HTML pages: one file each, which loads nothing and escapes what it is given."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from common.html import Script, Table, pack, write_page

TEMPLATE = """{% extends "page.html.j2" %}
{% from "parts.html.j2" import picture, table %}
{% block content %}<p title="{{ text }}">{{ text }}</p>{{ table(rows) }}{{ picture(file, text) }}{% endblock %}
"""


def write(folder: Path, **changes: object) -> str:
    (folder / "test.html.j2").write_text(TEMPLATE)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    table = Table(("<c>", "n"), [("<d>", 1)])
    values = {"title": "<t>", "text": '<p>&"', "rows": table, "file": folder / "picture.png", **changes}
    write_page(folder / "out/page.html", folder / "test.html.j2", **values)
    return (folder / "out/page.html").read_text()


def test_a_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert page.count("&lt;t&gt;") == 2
    assert page.count("&lt;p&gt;&amp;&#34;") == 3
    assert '<th class="text">&lt;c&gt;</th><th>n</th>' in page
    assert '<td class="text">&lt;d&gt;</td><td>1</td>' in page


def test_a_page_is_one_file_for_light_and_dark(tmp_path: Path) -> None:
    page = write(tmp_path)
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert links == ["data:image/png;base64,iVBORw=="]
    assert "prefers-color-scheme: dark" in page
    assert "url(" not in page


def test_a_page_runs_its_own_script_alone(tmp_path: Path) -> None:
    assert "script-src 'none'" in html.unescape(write(tmp_path))
    script = Script("alert(1)\n")
    page = write(tmp_path, script=script)
    (text,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    expected = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"script-src 'sha256-{expected}'" in html.unescape(page)


def test_packed_data_hold_no_markup_and_are_read_back() -> None:
    value = {"<script>": ["</script>&\u2028é", 1, None]}
    packed = pack(value)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == value


def test_a_long_table_is_folded(tmp_path: Path) -> None:
    assert "<details>" not in write(tmp_path)
    assert "<summary>31 rows</summary>" in write(tmp_path, rows=Table(("n",), [(n,) for n in range(31)]))


def test_a_value_that_is_missing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test.html.j2").write_text("{{ nothing }}")
    with pytest.raises(UndefinedError, match="nothing"):
        write_page(tmp_path / "page.html", tmp_path / "test.html.j2")
    assert not (tmp_path / "page.html").exists()

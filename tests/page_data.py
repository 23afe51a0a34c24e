"""The data of a page of `synth browse` or `dump browse`, as its script unpacks them."""

from __future__ import annotations

import base64
import gzip
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any


def unpack(page: Path) -> tuple[dict[str, Any], list[Any]]:
    """The index, and every row's facts and parts (name, pieces, spans, steps)."""
    blocks = re.findall(r'<script type="application/octet-stream" class="block">([^<]*)</script>', page.read_text())
    index, *rows = [json.loads(gzip.decompress(base64.b64decode(block))) for block in blocks]
    return index, [row for block in rows for row in block]


def text_of(index: dict[str, Any], row: Any) -> str:
    """The row's texts, those in the loss between « and »."""
    found = ""
    for _, pieces, spans, _ in row[1]:
        places = {place for start, end in zip(spans[::2], spans[1::2], strict=True) for place in range(start, end)}
        for supervised, group in groupby(enumerate(pieces), key=lambda item: item[0] in places):
            text = "".join(index["texts"][piece] for _, piece in group)
            found += f"«{text}»" if supervised else text
    return found

"""Write HTML pages from jinja2 templates: each one a single file that loads nothing, with all values escaped.

A page may have one script, which its security policy names by hash, and data that the script unpacks.

Reads:  the template, and in `common/templates` what all pages share: the frame, the stylesheet, tables and pictures.
Writes: the page.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import write_atomic

SHARED_TEMPLATES = Path(__file__).with_name("templates")
LONG_TABLE = 30


@dataclass(frozen=True)
class Table:
    """A table whose first `num_text` columns are text; the others are numbers and are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    num_text: int = 1

    @property
    def is_long(self) -> bool:
        """Whether the page folds it."""
        return len(self.rows) > LONG_TABLE


@dataclass(frozen=True)
class Script:
    """The script of a page; give it to `write_page` as the value `script`."""

    text: str

    @property
    def sha256(self) -> str:
        """The hash by which the page's policy allows the script."""
        return base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode()


def pack(value: object) -> str:
    """Return a value as gzip of its JSON, in base64, for a script to unpack: nothing in it can be taken for HTML."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def write_page(path: Path, template: Path, **values: object) -> None:
    """Render `template` with `values` and write the page to `path`."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED_TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = _read_base64
    write_atomic(path, environment.get_template(template.name).render(values))


def _read_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()

"""A mkdocs hook: pages keep their places in the repository, so that a link works here and on a code host alike.

Reads: the pages below, and the other files that they link to (images, source files).
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "recipes/*/README.md", "chat_templates/README.md")
LINK = re.compile(r"\]\(([^)#:\s]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ with the pages and what they link to, each at its path from the root."""
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {(page.parent / found).resolve() for page in pages for found in LINK.findall(page.read_text("utf-8"))}
    others = sorted(path for path in linked - {*pages} if path.is_file() and path.is_relative_to(ROOT))
    return Files([*theme, *(_file(path, config) for path in [*pages, *others])])


def _file(path: Path, config: MkDocsConfig) -> File:
    return File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls)

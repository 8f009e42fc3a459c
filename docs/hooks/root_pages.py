"""README.md, CHANGELOG.md and CONTRIBUTING.md, which stand beside docs/, as pages of the site."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add them, their links seen from docs/ instead of from the root."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its_page in PAGES.items():
            text = text.replace(f"]({other}", f"]({its_page}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of other pages lead to them."""
    folder = posixpath.dirname(page.file.src_uri)
    for source, its_page in PAGES.items():
        outside = posixpath.relpath(f"../{source}", folder or ".")
        markdown = markdown.replace(f"]({outside}", f"]({posixpath.relpath(its_page, folder or '.')}")
    return markdown

"""A folder in the navigation stands for its pages: index.md first, the others by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]


def on_config(config: Any) -> Any:
    """Replace the navigation's entries that name a folder of docs/."""
    for entry in config.nav:
        for title, value in entry.items():
            if isinstance(value, str) and (DOCS / value).is_dir():
                pages = sorted(
                    (DOCS / value).glob("*.md"), key=lambda page: (page.stem != "index", page.stem)
                )
                entry[title] = [str(page.relative_to(DOCS)) for page in pages]
    return config

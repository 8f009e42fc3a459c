"""Small valid files of every format, as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from importer_samples import WRITERS, Episodes, make_episodes


@pytest.fixture
def episodes() -> Episodes:
    return make_episodes()


@pytest.fixture
def write_sample(tmp_path: Path) -> Callable[..., Path]:
    """``write_sample(format, episodes=None) -> path`` of a small file with three episodes."""

    def write(name: str, episodes: Episodes | None = None) -> Path:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        return WRITERS[name](folder, make_episodes() if episodes is None else episodes)

    return write

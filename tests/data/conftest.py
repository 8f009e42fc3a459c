"""Small valid files of every format, as fixtures."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from importer_samples import WRITERS, Episodes, make_episodes


@pytest.fixture
def episodes() -> Episodes:
    return make_episodes()


@pytest.fixture(scope="session")
def written_sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``written_sample(format) -> path`` of a file that is written once and not to be changed."""

    @functools.cache
    def write(name: str) -> Path:
        return WRITERS[name](tmp_path_factory.mktemp(name), make_episodes())

    return write


@pytest.fixture
def write_sample(tmp_path: Path, written_sample: Callable[[str], Path]) -> Callable[..., Path]:
    """``write_sample(format, episodes=None) -> path`` of a small file with three episodes."""

    def write(name: str, episodes: Episodes | None = None) -> Path:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        if episodes is not None:
            return WRITERS[name](folder, episodes)
        sample = written_sample(name)
        shutil.copytree(sample.parent, folder, dirs_exist_ok=True)
        return folder / sample.name

    return write

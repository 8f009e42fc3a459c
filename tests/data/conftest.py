"""Small valid files of every format, as fixtures."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from importer_samples import WRITERS, Episodes, make_episodes

from flowpolicy.data.store import Demonstrations


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


@pytest.fixture
def recorded() -> Demonstrations:
    """Every kind of array that a store has, three episodes of it."""
    rng = np.random.default_rng(0)
    steps, ends = 12, np.array([5, 8, 12])
    arrays = {
        "action": rng.normal(size=(steps, 2)).astype(np.float32),
        "observation": rng.normal(size=(steps, 3)).astype(np.float32),
        "state": rng.normal(size=(steps, 1)).astype(np.float32),
        "images.top": rng.integers(0, 256, (steps, 16, 24, 3), np.uint8),
        "grey": rng.integers(0, 256, (steps, 16, 24, 1), np.uint8),
        "icon": rng.integers(0, 256, (steps, 4, 4, 3), np.uint8),
        "front": rng.uniform(0.5, 3, (steps, 8, 10)).astype(np.float32),
        "millimetres": rng.integers(500, 3000, (steps, 8, 10, 1)).astype(np.uint16),
        "tool": np.tile(np.eye(4, dtype=np.float32), (steps, 1, 1)),
        "buttons": rng.integers(0, 2, (steps, 2)).astype(bool),
        "time": np.arange(steps)[:, None] * 1e-3 + 1e9,
        "states": rng.normal(size=(steps, 5)).astype(np.float32),
        "reward": rng.normal(size=steps).astype(np.float32),
        "terminated": np.isin(np.arange(steps), ends[:1] - 1),
        "truncated": np.isin(np.arange(steps), ends[1:] - 1),
        "done": np.zeros(steps, np.int64),
        "source": rng.integers(0, 3, steps).astype(np.int8),
        "task_index": np.repeat([1, 0, 1], [5, 3, 4]),
    }
    kinds = {"images.top": "image", "grey": "image", "icon": "image", "tool": "pose", "task": "text"}
    depth = {"kind": "depth", "farthest": 3.0}
    attributes = {
        "fps": 20,
        "kinds": {**kinds, "front": depth, "millimetres": depth},
        "tasks": ["push", "lift it — gently"],
        "masks": {"valid": [1]},
        "env_id": "Toy-v0",
        "action_bounds": [[-4.0, -4.0], [4.0, 4.0]],
        "dimension_names": {"action": ["pan", "lift"]},
    }
    return Demonstrations(arrays, ends, attributes)

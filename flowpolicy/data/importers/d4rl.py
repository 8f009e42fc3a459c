"""Flat HDF5 in the manner of D4RL: one row per step, episodes marked by ``terminals`` and ``timeouts``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.hdf5 import dataset, feature_of, list_features, open_hdf5, open_rows
from flowpolicy.data.importers.source import Block, Feature, Source, read_parts
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError

_KEYS = {
    "observations": "observation",
    "actions": "action",
    "rewards": "reward",
    "terminals": "terminated",
    "timeouts": "truncated",
}
_FLAGS = ("terminals", "timeouts")


@contextlib.contextmanager
def open_d4rl(path: Path | str, episode_length: int | None = None) -> Iterator[Source]:
    """A file with ``observations``, ``actions`` and, where present, ``rewards``, ``terminals``, ``timeouts``.

    An episode ends where either flag is set. Steps after the last flag are kept as one more episode, marked
    truncated. Other arrays (``infos/qpos``, ``next_observations``) are read where they are named.

    Args:
        path: the HDF5 file.
        episode_length: for files without ``timeouts``: an episode also ends after this many steps.

    Raises:
        DataError: a damaged file.
    """
    path = resolve_path(path)
    with open_hdf5(path) as file:
        features = list_features([file], path, _feature)
        for name in _FLAGS:  # made here where the file has none
            features[name] = Feature(name, _KEYS[name], shape=())
        yield _FlatFile(
            str(path), features, ["the file"], {"imported_from": path.name}, file=file, path=path,
            episode_length=episode_length,
        )  # fmt: skip


def _feature(name: str, node: Any) -> Feature:
    key = _KEYS.get(name) or name.removeprefix("observations/").replace("/", ".")
    return feature_of(name, key, node, default=name in _KEYS or name.startswith("observations/"))


@dataclass
class _FlatFile(Source):
    file: Any = field(kw_only=True)
    path: Path = field(kw_only=True)
    episode_length: int | None = field(kw_only=True)
    _flags: dict[str, NDArray[Any]] = field(default_factory=dict, init=False)

    def lengths(self, action: Sequence[str]) -> NDArray[np.int64]:
        steps = len(open_rows(self.file, action[0], self.path))
        if steps == 0:
            raise DataError(f"{self.where}: '{action[0]}' holds no step; record at least one episode.")
        terminated, truncated = (self._flag(name, steps) for name in _FLAGS)
        if self.episode_length is not None:
            truncated |= _after_every(self.episode_length, terminated | truncated) & ~terminated
        if not (terminated | truncated).any():
            raise DataError(
                f"{self.where}: neither 'terminals' nor 'timeouts' marks the end of an episode; "
                "say how long one is with episode_length."
            )
        if not (terminated[-1] or truncated[-1]):
            truncated[-1] = True
        self._flags = {"terminals": terminated, "timeouts": truncated}
        ends = np.flatnonzero(terminated | truncated) + 1
        self.episodes = [f"episode {number}" for number in range(len(ends))]
        return np.diff(ends, prepend=0)

    def read(self, names: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[Block]:
        steps = int(lengths.sum())

        def rows(_: int, name: str) -> Any:
            if name in _FLAGS:
                return self._flags[name]
            node = open_rows(self.file, name, self.path)
            if len(node) != steps:
                raise DataError(
                    f"{self.where}: '{name}' has {len(node)} rows and the actions have {steps}; "
                    "every key needs one row per step."
                )
            return node

        return read_parts([steps], names, rows, self.where)

    def _flag(self, name: str, steps: int) -> NDArray[Any]:
        if name not in self.file:
            return np.zeros(steps, bool)
        node = open_rows(self.file, name, self.path)
        if node.size != steps:
            raise DataError(
                f"{self.where}: '{name}' has {node.size} values and the actions {steps} rows; they must "
                "agree."
            )
        flag = dataset(self.file, name, self.path).reshape(steps)
        if not np.isin(flag, (0, 1)).all():
            raise DataError(
                f"{self.where}: '{name}' must hold only 0 and 1; it marks the steps that end an episode."
            )
        return flag.astype(bool)


def _after_every(length: int, ends: NDArray[Any]) -> NDArray[Any]:
    if length < 1:
        raise DataError(f"episode_length is {length}; it must be at least 1.")
    marks = np.zeros(len(ends), bool)
    count = 0
    for step, end in enumerate(ends):
        count += 1
        marks[step] = count == length
        if end or marks[step]:
            count = 0
    return marks

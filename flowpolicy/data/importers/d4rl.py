"""Flat HDF5 as in D4RL: one row per step, episodes marked by ``terminals`` and ``timeouts``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.hdf5 import (
    dataset,
    feature_of,
    list_features,
    open_column,
    open_hdf5,
    open_rows,
)
from flowpolicy.data.importers.registry import importer
from flowpolicy.data.importers.source import ArraySource, Feature, Source
from flowpolicy.errors import DataError

_TERMINALS, _TIMEOUTS = "terminals", "timeouts"
_KEYS = {
    "observations": "observation",
    "actions": "action",
    "rewards": "reward",
    _TERMINALS: "terminated",
    _TIMEOUTS: "truncated",
}


@importer("d4rl", lambda contents: "actions" in contents.hdf5)
def open_d4rl(path: Path, episode_length: int | None = None) -> Iterator[Source]:
    """A file with ``observations``, ``actions`` and, where present, ``rewards``, ``terminals``, ``timeouts``.

    An episode ends where either flag is set. Steps after the last flag are kept as one more episode, marked
    truncated. Other arrays (``infos/qpos``, ``next_observations``) are read where they are named.

    Args:
        path: the HDF5 file.
        episode_length: for files without ``timeouts``: an episode also ends after this many steps.

    Raises:
        DataError: a damaged file.
    """
    flags: dict[str, NDArray[np.bool_]] = {}
    with open_hdf5(path) as file:

        def lengths(steps: int) -> NDArray[np.int64]:
            flags.update(_flags(file, path, steps, episode_length))
            return np.diff(np.flatnonzero(flags[_TERMINALS] | flags[_TIMEOUTS]) + 1, prepend=0)

        def rows(_: int, name: str) -> Any:
            return flags[name] if name in flags else open_column(file, features[name], path)

        made = {name: Feature(name, _KEYS[name], shape=()) for name in (_TERMINALS, _TIMEOUTS)}
        features = list_features([file], path, _feature) | made  # flags are made where the file has none
        yield ArraySource(str(path), features, rows=rows, flat_lengths=lengths)


def _feature(name: str, node: Any) -> Feature:
    key = _KEYS.get(name) or name.removeprefix("observations/").replace("/", ".")
    return feature_of(name, key, node, default=name in _KEYS or name.startswith("observations/"))


def _flags(file: Any, path: Path, steps: int, episode_length: int | None) -> dict[str, NDArray[np.bool_]]:
    """``terminals`` and ``timeouts`` of every step, ``(steps,)`` each; the last step has one of them."""
    terminated, truncated = (_flag(file, name, path, steps) for name in (_TERMINALS, _TIMEOUTS))
    if episode_length is not None:
        truncated |= _after_every(episode_length, terminated | truncated) & ~terminated
    if not (terminated | truncated).any():
        raise DataError(
            f"{path}: neither 'terminals' nor 'timeouts' marks the end of an episode; "
            "say how long one is with episode_length."
        )
    truncated[-1] |= not terminated[-1]
    return {_TERMINALS: terminated, _TIMEOUTS: truncated}


def _flag(file: Any, name: str, path: Path, steps: int) -> NDArray[np.bool_]:
    if name not in file:
        return np.zeros(steps, bool)
    if open_rows(file, name, path).size != steps:
        raise DataError(f"{path}: '{name}' must have one value per step, and there are {steps} actions.")
    flag = dataset(file, name, path).reshape(steps)
    if not np.isin(flag, (0, 1)).all():
        raise DataError(f"{path}: '{name}' must hold only 0 and 1; it marks the steps that end an episode.")
    return flag.astype(bool)


def _after_every(length: int, ends: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which steps are the ``length``-th, twice ``length``-th, ... of their episode."""
    if length < 1:
        raise DataError(f"episode_length is {length}; it must be at least 1.")
    steps = np.arange(len(ends))
    starts = np.maximum.accumulate(np.where(np.concatenate([[True], ends[:-1]]), steps, 0))
    return np.asarray((steps - starts + 1) % length == 0)

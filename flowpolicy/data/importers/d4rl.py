"""Flat HDF5 in the manner of D4RL: one row per step, episodes marked by ``terminals`` and ``timeouts``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.episodes import numeric
from flowpolicy.data.importers.hdf5 import dataset, open_hdf5
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError


def read_d4rl(path: Path | str, episode_length: int | None = None) -> Demonstrations:
    """Read ``observations``, ``actions`` and, where present, ``rewards``, ``terminals`` and ``timeouts``.

    An episode ends where either flag is set. Steps after the last flag are kept as one more episode, marked
    truncated.

    Args:
        path: the HDF5 file.
        episode_length: for files without ``timeouts``: an episode also ends after this many steps.

    Raises:
        DataError: a damaged file, a missing key, rows that differ in number, or no ends of episodes.
    """
    path = resolve_path(path)
    where = str(path)
    with open_hdf5(path) as file:
        arrays = {
            "observation": dataset(file, "observations", path),
            "action": dataset(file, "actions", path),
        }
        if "rewards" in file:
            arrays["reward"] = dataset(file, "rewards", path)
        flags = {name: dataset(file, name, path) for name in ("terminals", "timeouts") if name in file}
    steps = len(arrays["action"]) if arrays["action"].ndim else 0
    if steps == 0:
        raise DataError(f"{where}: 'actions' holds no step; record at least one episode.")
    terminated, truncated = (_flag(flags.get(name), name, steps, where) for name in ("terminals", "timeouts"))
    if episode_length is not None:
        truncated |= _after_every(episode_length, terminated | truncated) & ~terminated
    if not (terminated | truncated).any():
        raise DataError(
            f"{where}: neither 'terminals' nor 'timeouts' marks the end of an episode; "
            "say how long one is with episode_length."
        )
    if not (terminated[-1] or truncated[-1]):
        truncated[-1] = True
    arrays = {key: numeric(array, key, where) for key, array in arrays.items()}
    arrays |= {"terminated": terminated, "truncated": truncated}
    ends = np.flatnonzero(terminated | truncated) + 1
    return Demonstrations(arrays, ends, {"imported_from": path.name}, where)


def _flag(values: NDArray[Any] | None, name: str, steps: int, where: str) -> NDArray[Any]:
    if values is None:
        return np.zeros(steps, bool)
    if values.size != steps:
        raise DataError(
            f"{where}: '{name}' has {values.size} values and 'actions' {steps} rows; they must agree."
        )
    flag = values.reshape(steps)
    if not np.isin(flag, (0, 1)).all():
        raise DataError(f"{where}: '{name}' must hold only 0 and 1; it marks the steps that end an episode.")
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

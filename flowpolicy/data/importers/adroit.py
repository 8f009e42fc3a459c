"""The pickled human demonstrations of the Adroit hand (Rajeswaran et al. 2018)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.restricted_pickle import load_arrays
from flowpolicy.data.importers.source import Block, Bounds, Feature, Source, read_parts
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import kind_of

_KEYS = {"observations": "observation", "actions": "action", "rewards": "reward"}


@contextlib.contextmanager
def open_adroit(path: Path | str, clip: bool = True) -> Iterator[Source]:
    """A pickled list of episodes, dicts with ``observations``, ``actions`` and, if any, ``rewards``.

    The file is read without running anything it contains. The hand's actuators take actions in [-1, 1], and
    so does the environment; recorded actions outside are clipped, and their number is logged and kept in the
    attribute ``actions_clipped``.

    Args:
        path: the pickle.
        clip: bring actions into [-1, 1].

    Raises:
        DataError: a damaged or hostile file, or one of another structure.
    """
    path = resolve_path(path)
    content = load_arrays(path)
    where = str(path)
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{where} holds a {type(content).__name__} where a list of episodes is expected.")
    for number, item in enumerate(content):
        if not isinstance(item, dict):
            raise DataError(
                f"{where}: episode {number} is a {type(item).__name__} where a dictionary of arrays is "
                "expected."
            )
    features: dict[str, Feature] = {}
    for item in content:
        for name, value in item.items():
            if isinstance(name, str) and isinstance(value, np.ndarray) and value.ndim:
                kind, shape = kind_of(name, value.dtype, value.shape[1:]), value.shape[1:]
                key = _KEYS.get(name, name)
                features.setdefault(name, Feature(name, key, kind, shape, default=name in _KEYS))
            elif name in _KEYS:
                features.setdefault(name, Feature(name, _KEYS[name]))
    bounds = Bounds(np.array(-1.0), np.array(1.0)) if clip else None
    names = [f"episode {number}" for number in range(len(content))]
    about = {"imported_from": path.name}
    yield _Pickle(where, features, names, about, bounds=bounds, clip=clip, content=list(content))


@dataclass
class _Pickle(Source):
    content: list[dict[str, Any]] = field(kw_only=True)

    def lengths(self, action: Sequence[str]) -> NDArray[np.int64]:
        return np.array([len(self._array(i, action[0])) for i in range(len(self.content))], np.int64)

    def read(self, names: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[Block]:
        def rows(number: int, name: str) -> NDArray[Any]:
            array = self._array(number, name)
            if len(array) != lengths[number]:
                raise DataError(
                    f"{self.where}: '{name}' has {len(array)} rows in '{self.episodes[number]}' and its "
                    f"actions have {lengths[number]}; every key needs one row per step."
                )
            return array

        return read_parts(lengths, names, rows, self.where)

    def _array(self, number: int, name: str) -> NDArray[Any]:
        item = self.content[number]
        if name not in item:
            raise DataError(
                f"{self.where}: {self.episodes[number]} has no key '{name}'; an episode has observations and "
                "actions."
            )
        if not isinstance(item[name], np.ndarray) or item[name].ndim == 0:
            raise DataError(
                f"{self.where}: '{name}' of {self.episodes[number]} is a {type(item[name]).__name__}, not a "
                "numpy array with one row per step."
            )
        array: NDArray[Any] = item[name]
        return array

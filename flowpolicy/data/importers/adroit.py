"""The pickled human demonstrations of the Adroit hand (Rajeswaran et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.registry import Contents, importer
from flowpolicy.data.importers.restricted_pickle import NotNumbers, load_arrays
from flowpolicy.data.importers.source import ArraySource, Bounds, Feature, Source
from flowpolicy.errors import DataError

_KEYS = {"observations": "observation", "actions": "action", "rewards": "reward"}


def _is_pickle(contents: Contents) -> bool:
    return contents.head[:1] == b"\x80" or (
        contents.path.suffix in (".pickle", ".pkl") and contents.path.is_file()
    )


@importer("adroit", _is_pickle)
def open_adroit(path: Path, clip: bool = True) -> Iterator[Source]:
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
    episodes = load_arrays(path)
    if not isinstance(episodes, (list, tuple)):
        raise DataError(f"{path} holds a {type(episodes).__name__} where a list of episodes is expected.")
    features: dict[str, Feature] = {}
    for number, episode in enumerate(episodes):
        if not isinstance(episode, dict):
            raise DataError(
                f"{path}: episode {number} is a {type(episode).__name__} where a dictionary of arrays is "
                "expected."
            )
        for name, value in episode.items():
            if isinstance(name, str) and isinstance(value, np.ndarray) and value.ndim:
                key, default = _KEYS.get(name, name), name in _KEYS
                feature = Feature.of_array(name, key, value.dtype, value.shape[1:], default)
                features.setdefault(name, feature)
            elif name in _KEYS:
                features.setdefault(name, Feature(name, _KEYS[name]))
            elif isinstance(value, NotNumbers):
                features.setdefault(name, Feature(name, name, default=False, note=f"holds {value}"))

    def rows(number: int, name: str) -> NDArray[Any]:
        value = episodes[number].get(name)
        if not isinstance(value, np.ndarray):
            kind = f"an array of {value}" if isinstance(value, NotNumbers) else f"a {type(value).__name__}"
            found = f"no key '{name}'" if value is None else f"{kind} as '{name}'"
            raise DataError(f"{path}: episode {number} has {found}; it must be an array, one row per step.")
        return value

    yield ArraySource(
        str(path),
        features,
        [f"episode {number}" for number in range(len(episodes))],
        rows=rows,
        bounds=Bounds(np.array(-1.0), np.array(1.0)) if clip else None,
        clip=clip,
    )

"""Diffusion Policy's replay buffer (zarr), which is also this package's own store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.features import Kind
from flowpolicy.data.importers.registry import Contents, importer
from flowpolicy.data.importers.source import ArraySource, Feature, Source
from flowpolicy.data.keys import listed
from flowpolicy.data.store import episode_ends_problem
from flowpolicy.data.zarr_checks import MISSING_CHUNKS
from flowpolicy.data.zarr_reading import open_store
from flowpolicy.errors import DataError
from flowpolicy.settings import require


def _is_store(contents: Contents) -> bool:
    return contents.is_zip or any(map(contents.has, (".zgroup", "zarr.json", "meta/episode_ends")))


@importer("diffusion_policy", "Diffusion Policy's zarr replay buffer, folder or zip", _is_store)
def open_diffusion_policy(
    path: Path, keys: Iterable[str] | None = None, missing_chunks: str = "refuse"
) -> Iterator[Source]:
    """``data/<key>`` and ``meta/episode_ends`` of a zarr folder or a zip of one.

    Arrays in groups below ``data`` are keys with a dot: ``data/obs/eef`` becomes ``obs.eef``.

    Args:
        path: the folder, or the zip.
        keys: which data keys there are to be (``action`` always is); None is all.
        missing_chunks: ``fill`` reads chunks that are not stored as the declared fill value, as zarr's own
            writer means it; ``refuse`` does so only where their neighbours hold that value too.

    Raises:
        DataError: a damaged or inconsistent store, or a missing key.
    """
    require(missing_chunks in MISSING_CHUNKS, "options.missing_chunks", missing_chunks, "'refuse' or 'fill'")
    with open_store(path) as store:
        wanted = set(store.arrays) if keys is None else {*keys, "action"}
        for key in wanted - set(store.arrays):
            raise DataError(f"{path} has no key '{key}'; it has {listed(store.arrays)}.")
        features = {name: _feature(name, array) for name, array in store.arrays.items() if name in wanted}

        def lengths(action: str) -> NDArray[np.int64]:
            ends = store.read_ends()
            problem = episode_ends_problem(ends, _steps(store.arrays[action], action, path))
            if problem is not None:
                raise DataError(f"{path}: {problem}.")
            return np.diff(ends.astype(np.int64), prepend=0)

        def rows(_: int, name: str) -> Any:
            steps = int(store.episode_ends[-1])
            if (
                _steps(store.arrays[name], name, path) != steps
            ):  # before its chunks: they may be absurdly many
                raise DataError(
                    f"{path}: '{name}' has shape {store.arrays[name].shape} and there are {steps} steps; "
                    "every key needs one row per step."
                )
            return store.checked(name, missing_chunks)

        yield ArraySource(
            str(path), features, rows=rows, attributes=dict(store.attributes), action="action",
            timestamps="timestamp" if "timestamp" in features else None, flat_lengths=lengths,
        )  # fmt: skip


def _steps(array: Any, name: str, path: Path) -> int:
    if not array.shape:
        raise DataError(f"{path}: '{name}' is a single number; it must have one row per step.")
    return int(array.shape[0])


def _feature(name: str, array: Any) -> Feature:
    key = name.replace("/", ".")
    try:
        return Feature.of_array(name, key, np.dtype(array.dtype), array.shape[1:])
    except TypeError:  # a type that numpy does not know
        return Feature(name, key, Kind.OTHER)

"""Diffusion Policy's replay buffer (zarr), which is also this package's own store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.registry import Contents, importer
from flowpolicy.data.importers.source import ArraySource, Feature, Source
from flowpolicy.data.keys import listed
from flowpolicy.data.store import episode_ends_problem
from flowpolicy.data.zarr_checks import MISSING_CHUNKS
from flowpolicy.data.zarr_reading import OpenStore, open_store
from flowpolicy.errors import DataError, FlowPolicyError
from flowpolicy.features.undeclared import Kind
from flowpolicy.settings import require


def _is_store(contents: Contents) -> bool:
    return contents.is_zip or any(map(contents.has, (".zgroup", "zarr.json", "meta/episode_ends")))


@importer("diffusion_policy", _is_store)
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
        features = {name: _feature(name, store) for name in store.arrays if name in wanted}

        def lengths(steps: int) -> NDArray[np.int64]:
            ends = store.read_ends()
            problem = episode_ends_problem(ends, steps)
            if problem is not None:
                raise DataError(f"{path}: {problem}.")
            return np.diff(ends.astype(np.int64), prepend=0)

        yield ArraySource(
            str(path),
            features,
            attributes=dict(store.attributes),
            action="action",
            timestamps="timestamp" if "timestamp" in features else None,
            rows=lambda _, name: store.checked(name, missing_chunks),
            flat_lengths=lengths,
        )


def _feature(name: str, store: OpenStore) -> Feature:
    key, array = name.replace("/", "."), store.arrays[name]
    try:
        feature = Feature.of_array(name, key, np.dtype(array.dtype), array.shape[1:])
        return replace(feature, note="holds text") if feature.kind is Kind.TEXT else feature
    except FlowPolicyError:  # it cannot be opened, which is said where it is read
        return Feature(name, key)
    except TypeError:  # a type that numpy does not know
        return Feature(name, key, Kind.OTHER)

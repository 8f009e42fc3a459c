"""Diffusion Policy's replay buffer (zarr), which is also this package's own store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.source import Block, Feature, Source, read_parts
from flowpolicy.data.store import episode_ends_problem
from flowpolicy.data.zarr_checks import MISSING_CHUNKS
from flowpolicy.data.zarr_reading import OpenStore, listed, open_store, read_ends, resolve_path
from flowpolicy.errors import DataError
from flowpolicy.features.image import channels_first
from flowpolicy.features.stored import KINDS, stored_feature
from flowpolicy.features.undeclared import Kind, kind_of
from flowpolicy.settings import require


@contextlib.contextmanager
def open_diffusion_policy(
    path: Path | str, keys: Iterable[str] | None = None, missing_chunks: str = "refuse"
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
    path = resolve_path(path)
    with open_store(path) as store:
        wanted = None if keys is None else {*keys, "action"}
        for key in wanted or ():
            if key not in store.arrays:
                raise DataError(f"{path} has no key '{key}'; it has {listed(store.arrays)}.")
        features = {
            name: _feature(name, array, store)
            for name, array in store.arrays.items()
            if wanted is None or name in wanted
        }
        attributes = {**store.attributes}
        attributes.setdefault("imported_from", path.name)
        times = "timestamp" if "timestamp" in features else None
        yield _Store(
            str(path), features, ["the store"], attributes, action="action", timestamps=times,
            store=store, missing_chunks=missing_chunks,
        )  # fmt: skip


def _feature(name: str, array: Any, store: OpenStore) -> Feature:
    shape, kinds = tuple(array.shape[1:]), store.attributes.get(KINDS) or {}
    key = name.replace("/", ".")
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        return Feature(name, key, Kind.OTHER)
    is_declared = isinstance(kinds, Mapping) and name in kinds
    kind: str = kind_of(name, dtype, shape)
    if is_declared:
        kind = stored_feature(name, dtype, shape, store.attributes, store.path).name
    first = kind == Kind.IMAGE and len(shape) == 3 and channels_first(shape)
    declared = kinds[name] if is_declared else None
    return Feature(name, key, kind, shape, channels_first=first, declared=declared)


@dataclass
class _Store(Source):
    store: OpenStore = field(kw_only=True)
    missing_chunks: str = field(kw_only=True)

    def lengths(self, action: Sequence[str]) -> NDArray[np.int64]:
        shape = self.store.arrays[action[0]].shape
        if not shape:
            raise DataError(f"{self.where}: '{action[0]}' is a single number; it must have one row per step.")
        ends = read_ends(self.store)
        problem = episode_ends_problem(ends, shape[0])
        if problem is not None:
            raise DataError(f"{self.where}: {problem}.")
        self.episodes = [f"episode {number}" for number in range(len(ends))]
        return np.diff(ends.astype(np.int64), prepend=0)

    def read(self, names: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[Block]:
        steps = int(lengths.sum())
        for name in names:  # all shapes before any chunk: an absurd one has absurdly many
            shape = self.store.arrays[name].shape
            if not shape or shape[0] != steps:
                raise DataError(
                    f"{self.where}: '{name}' has shape {shape} and there are {steps} steps; "
                    "every key needs one row per step."
                )
        arrays = {name: self.store.checked(name, self.missing_chunks) for name in names}
        return read_parts([steps], names, lambda _, name: arrays[name], self.where)

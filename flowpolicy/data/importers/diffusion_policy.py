"""Diffusion Policy's replay buffer (zarr), which is also this package's own store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flowpolicy.data.importers.episodes import numeric
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.data.zarr_reading import resolve_path


def read_diffusion_policy(path: Path | str, keys: Iterable[str] | None = None) -> Demonstrations:
    """Read ``data/<key>`` and ``meta/episode_ends`` of a zarr folder or a zip of one.

    Images stored as floats become uint8 where every value is a whole number in 0..255; other floats become
    float32.

    Args:
        path: the folder, or the zip.
        keys: which data keys to read (``action`` always is); None reads all.

    Raises:
        DataError: a damaged or inconsistent store, or a missing key.
    """
    path = resolve_path(path)
    demos = read_demonstrations(path, keys)
    arrays = {key: numeric(array, key, demos.source) for key, array in demos.arrays.items()}
    attributes = {**demos.attributes}
    attributes.setdefault("imported_from", path.name)
    return Demonstrations(arrays, demos.episode_ends, attributes, demos.source)

"""HDF5 files opened with care: every failure is one sentence, and nothing outside the file is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.zarr_reading import first_line
from flowpolicy.errors import DataError


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Yield the open ``h5py.File``.

    Raises:
        DataError: h5py is not installed, or the file is missing, cut off, damaged, or not HDF5; also for
            whatever h5py raises inside the block.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{path} needs h5py to be read; install it with: pip install 'flowpolicy[import]'."
        ) from error
    if not path.exists():
        raise DataError(f"There is no file {path}; check the path.")
    if path.is_dir():
        raise DataError(f"{path} is a folder where an HDF5 file is expected; give the file itself.")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, ... for damaged files
        raise DataError(
            f"{path} cannot be read as HDF5 ({first_line(error)}); it is damaged or of another format."
        ) from error


def dataset(group: Any, key: str, path: Path) -> NDArray[Any]:
    """The whole dataset ``group[key]``.

    Raises:
        DataError: a missing key, a group instead of a dataset, text or objects instead of numbers, data kept
            outside the file, or chunks that were never written.
    """
    node = child(group, key, path)
    full = node.name.lstrip("/")
    if not hasattr(node, "dtype"):
        raise DataError(f"{path}: '{full}' is a group where an array is expected.")
    if node.dtype.kind not in "fiub":
        raise DataError(f"{path}: '{full}' holds {node.dtype}, not numbers; convert or leave it out.")
    if node.external is not None or node.is_virtual:
        raise DataError(
            f"{path}: '{full}' keeps its data in another file; copy them into this one (h5repack)."
        )
    if node.size and not _is_written(node):
        raise DataError(f"{path}: '{full}' was never fully written; record or copy the file again.")
    try:
        return np.asarray(node[()])
    except Exception as error:
        raise DataError(
            f"{path}: '{full}' cannot be read ({first_line(error)}); copy the file again."
        ) from error


def child(group: Any, key: str, path: Path) -> Any:
    """``group[key]``, a group or dataset of the same file.

    Raises:
        DataError: a missing key (naming those there are), or a link to another file.
    """
    import h5py

    link = group.get(key, getlink=True)
    if link is None:
        inside = group.name.strip("/")
        has = ", ".join(f"'{name}'" for name in list(group)[:12]) or "nothing"
        where = f"'{inside}' has no key '{key}'" if inside else f"there is no key '{key}'"
        raise DataError(f"{path}: {where} (it has {has}); check the format and the key.")
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{path}: '{key}' is a link to another file; copy the data into this one (h5repack).")
    return group[key]


def json_attribute(node: Any, name: str, path: Path) -> Any:
    """The JSON text in attribute ``name``, parsed; None where it is absent."""
    if name not in node.attrs:
        return None
    try:
        return json.loads(node.attrs[name])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}: attribute '{name}' is not JSON ({first_line(error)}); repair or remove it."
        ) from error


def is_group(node: Any) -> bool:
    """Whether ``node`` has children."""
    return not hasattr(node, "dtype")


def _is_written(node: Any) -> bool:
    if node.chunks is None:
        return bool(node.id.get_storage_size() > 0)
    expected = int(
        np.prod([-(-length // chunk) for length, chunk in zip(node.shape, node.chunks, strict=True)])
    )
    return int(node.id.get_num_chunks()) >= expected

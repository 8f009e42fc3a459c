"""HDF5 files opened with care: every failure is one sentence, and nothing outside the file is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import first_line, reading_error
from flowpolicy.data.importers.source import ArraySource, Feature
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind
from flowpolicy.optional import optional
from flowpolicy.texts import LONGEST_TEXT

_MAX_DEPTH = 12
_MAX_LEAVES = 2000
_MAX_CHUNK = 1 << 28  # bytes of one chunk, unpacked: no recording has larger ones
_MAX_ATTRIBUTE = 1 << 24
_TEXTS = 64  # read at a time

Describe = Callable[[str, Any], Feature]
"""From a column's path inside its episode, and its dataset (None: broken), to how it is listed."""


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Yield the open ``h5py.File``.

    Raises:
        DataError: h5py is not installed, or the file is missing, cut off, damaged, or not HDF5; also for
            whatever h5py raises inside the block.
    """
    with optional(f"{path} needs h5py to be read", "import", DataError):
        import h5py
    if path.is_dir():
        raise DataError(f"{path} is a folder where an HDF5 file is expected; give the file itself.")
    with hdf5_explained(path):
        if not path.exists():
            raise DataError(f"There is no file {path}; check the path.")
        with h5py.File(path, "r") as file:
            yield file


@contextlib.contextmanager
def hdf5_explained(path: Path) -> Iterator[None]:
    """Whatever h5py raises inside the block becomes one sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, ... for damaged files
        remedy = "it is damaged or of another format"
        raise reading_error(error, path, "cannot be read as HDF5", remedy) from error


def feature_of(name: str, key: str, node: Any, *, default: bool) -> Feature:
    """How a dataset is listed; ``node`` is None where it cannot be opened."""
    import h5py

    if node is None:
        return Feature(name, key, Kind.OTHER, default=default, note="cannot be opened")
    feature = Feature.of_array(name, key, node.dtype, (node.shape or ())[1:], default)
    is_text = node.dtype.kind == "O" and h5py.check_string_dtype(node.dtype) is not None
    return dataclasses.replace(feature, kind=Kind.TEXT) if is_text else feature


def open_column(group: Any, feature: Feature, path: Path) -> Any:
    """The dataset of a column, to be sliced: numbers by :func:`open_rows`, or the strings of a text."""
    if feature.kind != Kind.TEXT:
        return open_rows(group, feature.name, path)
    return _Texts(open_rows(group, feature.name, path, "OS"), path)


class _Texts:
    """Strings ``(rows,)``, read a few at a time, since each may be as long as the file."""

    def __init__(self, node: Any, path: Path) -> None:
        import h5py

        rows = node.shape[:1]
        is_text = h5py.check_string_dtype(node.dtype) is not None and node.dtype.itemsize <= LONGEST_TEXT
        if not is_text or node.size != math.prod(rows):
            raise DataError(f"{path}: '{node.name.strip('/')}' must hold one text a row; leave it out.")
        self._node, self._path = node, path
        self.shape, self.dtype = rows, np.dtype(("S", LONGEST_TEXT))

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        texts: list[str] = []
        for first in range(rows.start, rows.stop, _TEXTS):
            content = self._node[first : min(rows.stop, first + _TEXTS)].reshape(-1)
            if max(map(len, content)) > LONGEST_TEXT:
                name = self._node.name.strip("/")
                raise DataError(
                    f"{self._path}: '{name}' has a text beyond {LONGEST_TEXT} bytes; leave it out."
                )
            texts += [text.decode("utf-8", "replace") for text in content]
        return np.array(texts, object)


def open_rows(group: Any, key: str, path: Path, kinds: str = "fiub") -> Any:
    """The dataset ``group[key]``, to be sliced; nothing of it is read yet.

    Args:
        group: open.
        key: below the group.
        path: the file, for messages.
        kinds: of the elements, as numpy's types call them.

    Raises:
        DataError: a missing key, a group instead of a dataset, elements of another kind (text or objects
            instead of numbers), data kept outside the file, or chunks that were never written.
    """
    node = child(group, key, path)
    full = (node.name or key).lstrip("/")
    if is_group(node):
        raise DataError(f"{path}: '{full}' is a group where an array is expected.")
    if node.dtype.kind not in kinds:
        wanted = "numbers" if "f" in kinds else "text"
        raise DataError(f"{path}: '{full}' holds {node.dtype}, not {wanted}; convert or leave it out.")
    if node.external is not None or node.is_virtual:
        raise DataError(
            f"{path}: '{full}' keeps its data in another file; copy them into this one (h5repack)."
        )
    if node.size and not _is_written(node):
        raise DataError(f"{path}: '{full}' was never fully written; record or copy the file again.")
    if node.chunks is not None and np.prod(node.chunks, dtype=np.float64) * node.dtype.itemsize > _MAX_CHUNK:
        raise DataError(f"{path}: '{full}' has chunks beyond {_MAX_CHUNK >> 20} MB; rewrite it (h5repack).")
    return node


def dataset(group: Any, key: str, path: Path) -> NDArray[Any]:
    """The whole of :func:`open_rows`, for what is small."""
    node = open_rows(group, key, path)
    try:
        return np.asarray(node[()])
    except Exception as error:
        name = node.name.lstrip("/")
        raise reading_error(error, path, f"cannot be read at '{name}'", "copy the file again") from error


def child(group: Any, key: str, path: Path) -> Any:
    """``group[key]``, a group or dataset of the same file.

    Raises:
        DataError: a missing key (naming those there are), or a link to another file.
    """
    import h5py

    inside = group.name.strip("/")
    for part in key.split("/"):
        link = group.get(part, getlink=True) if is_group(group) else None
        if link is None:
            has = ", ".join(f"'{name}'" for name in list(group)[:12]) if is_group(group) else ""
            where = f"'{inside}' has no key '{key}'" if inside else f"there is no key '{key}'"
            raise DataError(f"{path}: {where} (it has {has or 'nothing'}); check the format and the key.")
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"{path}: '{key}' is a link to another file; copy the data into this one (h5repack)."
            )
        try:
            group = group[part]
        except Exception as error:  # a link to nowhere, or a damaged header
            raise reading_error(error, path, f"cannot be read at '{key}'") from error
    return group


def json_attribute(node: Any, name: str, path: Path) -> Any:
    """The JSON text in attribute ``name``, parsed; None where it is absent."""
    if name not in node.attrs:
        return None
    try:
        content = node.attrs[name]
        if len(content) > _MAX_ATTRIBUTE:
            raise ValueError(f"{len(content)} bytes are too many")
        return json.loads(content)
    except (TypeError, ValueError, RecursionError) as error:
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
        np.prod(
            [-(-length // chunk) for length, chunk in zip(node.shape, node.chunks, strict=True)],
            dtype=np.float64,
        )
    )
    return int(node.id.get_num_chunks()) >= expected


def group_source(path: Path, groups: Mapping[str, Any], describe: Describe, **about: Any) -> ArraySource:
    """A source whose episodes are groups of one file, each with an array a column.

    Args:
        path: the file, for messages.
        groups: the episodes' groups, open, by their names, in order.
        describe: how a column is listed.
        about: the other fields of :class:`ArraySource`.
    """
    opened = list(groups.values())
    features = list_features(opened, path, describe)

    def rows(number: int, name: str) -> Any:
        return open_column(opened[number], features[name], path)

    return ArraySource(str(path), features, list(groups), rows=rows, **about)


def list_features(groups: Sequence[Any], path: Path, describe: Describe) -> dict[str, Feature]:
    """The columns of episodes that are HDF5 groups, each as it is where it first occurs; nothing is read.

    Links to other files are not followed, and what one group has shown of a name is not looked up in the
    next: files have thousands of episodes.
    """
    features: dict[str, Feature] = {}
    inner: set[str] = set()
    for group in groups:
        if not is_group(group):
            raise DataError(f"{path}: '{group.name}' is an array where a demonstration is expected.")
        for name, note in _leaves(group, features, inner):
            feature = describe(name, None if note else _node(group, name))
            features[name] = dataclasses.replace(feature, note=note or feature.note)
            if len(features) > _MAX_LEAVES:
                raise DataError(
                    f"{path}: '{group.name}' holds more than {_MAX_LEAVES} arrays; is it one episode?"
                )
    return features


def _leaves(
    group: Any, known: Container[str], inner: set[str], prefix: str = "", depth: int = _MAX_DEPTH
) -> Iterator[tuple[str, str]]:
    """Datasets below a group that are not known yet: path inside it, and why not to open it, if so.

    Args:
        group: open.
        known: paths of datasets.
        inner: paths of groups; those that are found are added.
        prefix: the group's own path.
        depth: levels to go down.
    """
    import h5py

    for name in group:
        full = f"{prefix}{name}"
        if full in known:
            continue
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            yield full, "is a link to another file"
        elif full in inner or _class_of(group, name) is h5py.Group:
            inner.add(full)
            if depth == 0:
                yield full, "is nested too deeply"
            else:
                yield from _leaves(group[name], known, inner, f"{full}/", depth - 1)
        else:
            yield full, "" if _class_of(group, name) is h5py.Dataset else "cannot be opened"


def _class_of(group: Any, name: str) -> Any:
    try:
        return group.get(name, getclass=True)
    except Exception:  # a link to nowhere, or a damaged header
        return None


def _node(group: Any, name: str) -> Any:
    """A dataset, or None where it cannot be opened or holds nothing."""
    try:
        node = group[name]
        return None if node.dtype is None else node
    except Exception:  # it is listed as one that cannot be opened
        return None

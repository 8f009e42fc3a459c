"""HDF5 files opened with care: every failure is one sentence, and nothing outside the file is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import first_line, reading_error
from flowpolicy.data.features import Kind, channels_first, kind_of
from flowpolicy.data.importers.source import Block, Feature, Source, read_parts
from flowpolicy.errors import DataError
from flowpolicy.optional import optional

_MAX_DEPTH = 12
_MAX_LEAVES = 2000
_MAX_CHUNK = 1 << 28  # bytes of one chunk, unpacked: no recording has larger ones
_MAX_ATTRIBUTE = 1 << 24

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


class _Leaves:
    """The datasets below groups of one layout by their path inside each: empty text, or why not to open one.

    Links to other files are not followed, nothing is opened, and what one group has shown of a name is not
    looked up in the next: files have thousands of episodes.
    """

    def __init__(self, path: Path) -> None:
        self.found: dict[str, str] = {}
        self._groups: set[str] = set()
        self._path = path

    def add(self, group: Any, prefix: str = "", depth: int = _MAX_DEPTH) -> None:
        """Collect what is below ``group``."""
        import h5py

        for name in group:
            full = f"{prefix}{name}"
            if full in self.found:
                continue
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                self.found[full] = "is a link to another file"
            elif full in self._groups or _class_of(group, name) is h5py.Group:
                if depth == 0:
                    self.found[full] = "is nested too deeply"
                else:
                    self._groups.add(full)
                    self.add(group[name], f"{full}/", depth - 1)
            else:
                self.found[full] = "" if _class_of(group, name) is h5py.Dataset else "cannot be opened"
            if len(self.found) > _MAX_LEAVES:
                raise DataError(
                    f"{self._path}: '{group.name}' holds more than {_MAX_LEAVES} arrays; is it one episode?"
                )


def _class_of(group: Any, name: str) -> Any:
    try:
        return group.get(name, getclass=True)
    except Exception:  # a link to nowhere, or a damaged header
        return None


def feature_of(name: str, key: str, node: Any, *, default: bool, note: str = "") -> Feature:
    """How a dataset is listed; ``node`` is None where it cannot be opened, and ``note`` says why."""
    if node is None:
        return Feature(name, key, Kind.OTHER, default=default, note=note or "cannot be opened")
    shape = tuple(int(n) for n in (node.shape or ())[1:])
    kind = kind_of(name, node.dtype, shape)
    if node.dtype.kind == "O":  # of variable length: text, or one encoded image a row
        kind = Kind.TEXT
    first = kind is Kind.IMAGE and len(shape) == 3 and channels_first(shape)
    return Feature(name, key, kind, shape, default=default, note=note, channels_first=first)


def open_rows(group: Any, key: str, path: Path) -> Any:
    """The dataset ``group[key]``, to be sliced; nothing of it is read yet.

    Raises:
        DataError: a missing key, a group instead of a dataset, text or objects instead of numbers, data kept
            outside the file, or chunks that were never written.
    """
    node = child(group, key, path)
    full = (node.name or key).lstrip("/")
    if is_group(node):
        raise DataError(f"{path}: '{full}' is a group where an array is expected.")
    if node.dtype.kind not in "fiub":
        raise DataError(f"{path}: '{full}' holds {node.dtype}, not numbers; convert or leave it out.")
    if not node.shape:
        raise DataError(f"{path}: '{full}' is a single number; it must have one row per step.")
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


@dataclass
class Hdf5Episodes(Source):
    """Episodes that are groups of HDF5, in one file or in several.

    Attributes:
        group: ``group(number)`` is the open group of an episode.
        path: ``path(number)`` is the file it lies in.
        longer: whether a column has one row more than there are actions; the last row is left out.
    """

    group: Callable[[int], Any] = field(kw_only=True)
    path: Callable[[int], Path] = field(kw_only=True)
    longer: Callable[[str], bool] = field(kw_only=True, default=lambda name: False)

    def lengths(self, action: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the action in each episode, ``(episodes,)``."""
        counts = [
            len(open_rows(self.group(i), action[0], self.path(i))) - self.longer(action[0])
            for i in range(len(self.episodes))
        ]
        return np.array([max(0, count) for count in counts], np.int64)

    def read(self, names: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[Block]:
        """The chosen columns, episode by episode."""

        def rows(number: int, name: str) -> Any:
            node = open_rows(self.group(number), name, self.path(number))
            extra = int(self.longer(name))
            if len(node) != lengths[number] + extra:
                rule = "one row more than actions" if extra else "one row per step"
                raise DataError(
                    f"{self.path(number)}: '{name}' has {len(node)} rows in '{self.episodes[number]}' and "
                    f"its actions have {lengths[number]}; every such key needs {rule}."
                )
            return node

        return read_parts(lengths, names, rows, self.where)


def list_features(groups: Sequence[Any], path: Path, describe: Describe) -> dict[str, Feature]:
    """The columns of episodes that are HDF5 groups, each as it is where it first occurs; nothing is read."""
    features: dict[str, Feature] = {}
    known = _Leaves(path)
    for group in groups:
        if not is_group(group):
            raise DataError(f"{path}: '{group.name}' is an array where a demonstration is expected.")
        known.add(group)
        for name in list(known.found)[len(features) :]:
            feature = describe(name, _node(group, name, known.found[name]))
            features[name] = dataclasses.replace(feature, note=feature.note or known.found[name])
    return features


def _node(group: Any, name: str, note: str) -> Any:
    """A dataset, or None where it cannot be opened or holds nothing."""
    if note:
        return None
    try:
        node = group[name]
        return None if node.dtype is None else node
    except Exception:  # it is listed as one that cannot be opened
        return None

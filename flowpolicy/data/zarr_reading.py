"""The arrays of a zarr store as they stand on disk, with the damage that zarr overlooks refused."""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import reading_error
from flowpolicy.data.image_codecs import is_whole_uint8, register_codecs
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.zarr_checks import check_array, group_in_zip, names_below
from flowpolicy.errors import DataError, FlowPolicyError
from flowpolicy.features import Feature
from flowpolicy.features.stored import KINDS, stored_feature
from flowpolicy.files.storage import atomic_file
from flowpolicy.optional import missing, optional
from flowpolicy.runs.progress import progress

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class OpenStore:
    """A store that is open for reading.

    Attributes:
        path: of its folder or zip.
        arrays: zarr arrays by the path below ``data``, in the order of their names; none has been read. One
            that zarr cannot open is an :class:`UnopenedArray`.
        episode_ends: as stored.
        attributes: of the store.
    """

    path: Path
    arrays: dict[str, Any]
    episode_ends: Any
    attributes: dict[str, Any]

    def declare(self, kinds: Mapping[str, Any]) -> None:
        """Take kinds by key before those that the store declares."""
        if kinds:
            self.attributes[KINDS] = {**(self.attributes.get(KINDS) or {}), **kinds}

    def feature(self, key: str) -> Feature:
        """What ``key`` holds, as it is declared or else as it looks."""
        array = self.arrays[key]
        return stored_feature(key, array.dtype, array.shape[1:], self.attributes, self.path)

    def checked(self, key: str, missing_chunks: str = "refuse") -> Any:
        """The zarr array of ``key``, to be sliced, when its stored chunks have been looked at.

        Raises:
            DataError: no numbers, or chunks that are damaged or missing.
        """
        array = self.arrays[key]
        check_array(array, f"data/{key}", self.path, missing_chunks)
        return array

    def read(self, key: str, image_memory_bytes: int | None = None) -> NDArray[Any]:
        """The whole array of ``key``; images of whole floats as uint8.

        Images of more than ``image_memory_bytes`` are mapped from a file; None: they stay where they are, and
        are read where they are sliced.

        Raises:
            DataError: besides what :meth:`checked` raises, more than the memory that is free.
        """
        array = self.checked(key)
        if self.feature(key).is_frame:
            if image_memory_bytes is None and array.dtype == np.uint8:
                return cast("NDArray[Any]", StoredImages(array, self.path))
            if image_memory_bytes is not None and math.prod(array.shape) > image_memory_bytes:
                return _mapped(array, key, self.path)
            if array.dtype.kind == "f":
                images = np.empty(array.shape, np.uint8)
                if _fill_with_images(images, array):
                    return images
        elif math.prod(array.shape) * np.dtype(array.dtype).itemsize > free_memory_bytes():
            raise DataError(
                f"{self.path}: '{key}' takes more memory than is free; choose fewer keys, or use a machine "
                "with more."
            )
        return np.asarray(array[...])

    def read_ends(self) -> NDArray[Any]:
        """The ends of the episodes, as stored; their content is not judged."""
        check_array(self.episode_ends, "meta/episode_ends", self.path)
        return np.asarray(self.episode_ends[...])


@contextlib.contextmanager
def open_store(path: Path | str) -> Iterator[OpenStore]:
    """Yield a store; what zarr raises inside the block becomes one sentence.

    Raises:
        DataError: where the store cannot be read at all; its content is not judged.
    """
    path = resolve_path(path)
    zarr = import_zarr()
    has_codecs = register_codecs()
    if not path.exists():
        raise DataError(f"No demonstrations at {path}; give an existing .zarr folder or .zarr.zip file.")
    store: Any = None
    try:
        prefix = ""
        if path.is_file():
            prefix = group_in_zip(path)
            store = zarr.storage.ZipStore(str(path), mode="r")
            group = zarr.open_group(store, path=prefix, mode="r")
        else:
            group = zarr.open_group(str(path), mode="r")
        ends = group["meta/episode_ends"]
        arrays = dict(sorted(_arrays(group["data"], path, has_codecs)))
        yield OpenStore(path, arrays, ends, dict(group.attrs))
    except DataError:
        raise
    except KeyError as error:
        raise DataError(
            f"{path} lacks {error}; a store has data/<key> arrays and meta/episode_ends (see docs/data.md)."
        ) from error
    except Exception as error:  # zarr and its codecs raise whatever their lower layers raise
        raise _explained(error, str(path), "is damaged or not a zarr store", has_codecs) from error
    finally:
        if store is not None:
            store.close()


class UnopenedArray:
    """An array that zarr cannot open: whoever looks at it is told, and nobody else.

    Args:
        error: what zarr said, as one sentence.
    """

    def __init__(self, error: FlowPolicyError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def _arrays(
    group: Any, path: Path, has_codecs: bool, prefix: str = "", depth: int = 8
) -> Iterator[tuple[str, Any]]:
    """Every array below a group by its path, those of nested groups too; zarr's own list needs all sound."""
    for name in names_below(path, group.path):
        try:
            member = group[name]
        except KeyError:  # a file of somebody else's
            continue
        except Exception as error:
            where = f"{path}: 'data/{prefix}{name}'"
            yield prefix + name, UnopenedArray(_explained(error, where, "cannot be opened", has_codecs))
            continue
        if hasattr(member, "shape"):
            yield prefix + name, member
        elif depth:
            yield from _arrays(member, path, has_codecs, f"{prefix}{name}/", depth - 1)


def _explained(error: Exception, where: str, what: str, has_codecs: bool) -> FlowPolicyError:
    if "imagecodecs" in str(error) and not has_codecs:
        return DataError(missing(f"{where} holds images that need imagecodecs", "images"))
    return reading_error(error, where, what)


class StoredImages:
    """uint8 images ``(steps, height, width, channels)`` that stay on disk; sliced like an array."""

    def __init__(self, array: Any, path: Path) -> None:
        zarr = import_zarr()
        # Opened once more, as the store that it was listed in will be closed.
        store = zarr.storage.ZipStore(str(path), mode="r") if path.is_file() else str(path)
        self._array, self._path = zarr.open_array(store, path=array.path, mode="r"), path
        self.shape, self.ndim, self.size = tuple(array.shape), len(array.shape), math.prod(array.shape)
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        try:
            return np.asarray(self._array[rows])
        except Exception as error:
            raise reading_error(error, self._path, "has damaged images") from error


def import_zarr() -> Any:
    """The zarr package, which only reading and writing stores needs.

    Raises:
        DataError: it is not installed.
    """
    with optional("Demonstration stores need zarr", "train", DataError):
        import zarr
    return zarr


def resolve_path(path: Path | str) -> Path:
    """``path`` with ``~`` expanded; ``pkg://package/file`` becomes the file inside that installed package."""
    text = str(path)
    if not text.startswith("pkg:/"):  # a Path has made one slash of the two
        return Path(text).expanduser()
    package, _, inside = text.removeprefix("pkg:").lstrip("/").partition("/")
    try:
        return Path(str(importlib.resources.files(package))) / inside
    except (ImportError, TypeError, ValueError) as error:
        raise DataError(
            f"{text}: the package '{package}' is not installed; install it or give a path."
        ) from error


def _mapped(array: Any, key: str, path: Path) -> NDArray[Any]:
    """Images as an array that is mapped from a file beside the store, which is written if it is not there.

    Its name holds the store's size and time, so that a store that was replaced is unpacked again.
    """
    about = path.stat()
    stamp = f"{about.st_size:x}-{about.st_mtime_ns:x}"
    file = path.with_name(f"{path.name}.unpacked") / f"{Path(key).name}-{stamp}.npy"
    if not file.exists():
        logger.info("Unpacking data/%s of %s to %s, once.", key, path, file)
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file) as temporary:
            images: np.memmap[Any, Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                temporary, "w+", np.uint8, array.shape
            )
            if not _fill_with_images(images, array):
                raise DataError(
                    f"{path}: 'data/{key}' holds images of {array.dtype} that are no whole numbers from 0 to "
                    "255; store them as uint8."
                )
            images.flush()
    mapped: NDArray[Any] = np.load(file, mmap_mode="c")
    return mapped


def _fill_with_images(images: NDArray[Any], array: Any) -> bool:
    """Copy images, read a few at a time; False unless every value is a whole number in 0..255."""
    row = int(np.prod(array.shape[1:])) * array.dtype.itemsize
    rows = max(1, int(array.chunks[0]), _BLOCK_BYTES // max(1, row))
    for start in progress(range(0, len(images), rows), "read images"):
        block = np.asarray(array[start : start + rows])
        if not is_whole_uint8(block):
            return False
        images[start : start + rows] = block
    return True

"""The arrays of a zarr store as they stand on disk, with the damage that zarr overlooks refused."""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import reading_error
from flowpolicy.data.features import Kind, kind_of
from flowpolicy.data.image_codecs import register_codecs
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.zarr_checks import check_array, group_in_zip
from flowpolicy.errors import DataError
from flowpolicy.files.storage import atomic_file
from flowpolicy.observations import is_image
from flowpolicy.optional import missing, optional

logger = logging.getLogger(__name__)

EPISODE_KEYS = ("reward", "terminated", "truncated")
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class OpenStore:
    """A store that is open for reading.

    Attributes:
        path: of its folder or zip.
        arrays: zarr arrays by the path below ``data``, in the order of their names; none has been read.
        episode_ends: as stored.
        attributes: of the store.
    """

    path: Path
    arrays: dict[str, Any]
    episode_ends: Any
    attributes: dict[str, Any]

    def checked(self, key: str, missing_chunks: str = "refuse") -> Any:
        """The zarr array of ``key``, to be sliced, when its stored chunks have been looked at.

        Raises:
            DataError: no numbers, or chunks that are damaged or missing.
        """
        array = self.arrays[key]
        check_array(array, f"data/{key}", self.path, missing_chunks)
        return array


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
        yield OpenStore(path, dict(sorted(_arrays(group["data"]))), ends, dict(group.attrs))
    except DataError:
        raise
    except KeyError as error:
        raise DataError(
            f"{path} lacks {error}; a store has data/<key> arrays and meta/episode_ends (see docs/data.md)."
        ) from error
    except Exception as error:  # zarr and its codecs raise whatever their lower layers raise
        if "imagecodecs" in str(error) and not has_codecs:
            raise DataError(missing(f"{path} holds images that need imagecodecs", "images")) from error
        raise reading_error(error, path, "is damaged or not a zarr store") from error
    finally:
        if store is not None:
            store.close()


def _arrays(group: Any, prefix: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    """Every array below a group by its path, those of nested groups too."""
    for name, member in group.members():
        if hasattr(member, "shape"):
            yield prefix + name, member
        elif depth:
            yield from _arrays(member, f"{prefix}{name}/", depth - 1)


def read_unchecked(
    path: Path | str,
    keys: Iterable[str] | None = None,
    image_memory_bytes: int | None = None,
    *,
    leave_images: bool = False,
) -> tuple[dict[str, NDArray[Any]], NDArray[Any], dict[str, Any]]:
    """The arrays, episode ends and attributes of a store as they stand, for looking at a broken one.

    Images of a key that take more than ``image_memory_bytes`` are mapped from a file; None: none is. With
    ``leave_images`` those of uint8 stay on disk and are read where they are sliced.

    Raises:
        DataError: where the store cannot be read at all; its content is not judged.
    """
    with open_store(path) as store:
        names = list(store.arrays)
        wanted = names if keys is None else _wanted(keys, names, store.path)
        arrays = {}
        for name in wanted:
            array = store.checked(name)
            size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
            if not is_image(array.shape[1:]) and size > free_memory_bytes():
                raise DataError(
                    f"{store.path}: '{name}' takes {size / 1e9:.1f} GB, more memory than is free; choose "
                    "fewer keys, or use a machine with more."
                )
            if leave_images and array.dtype == np.uint8 and is_image(array.shape[1:]):
                arrays[name] = cast("NDArray[Any]", StoredImages(array, store.path))
                continue
            is_large = image_memory_bytes is not None and is_image(array.shape[1:])
            is_large = is_large and int(np.prod(array.shape)) > (image_memory_bytes or 0)
            read = _mapped if is_large else _whole
            arrays[name] = read(array, f"data/{name}", store.path)
        return arrays, read_ends(store), store.attributes


def read_ends(store: OpenStore) -> NDArray[Any]:
    """The ends of the episodes, as stored."""
    check_array(store.episode_ends, "meta/episode_ends", store.path)
    return np.asarray(store.episode_ends[...])


class StoredImages:
    """uint8 images ``(steps, height, width, channels)`` that stay on disk; sliced like an array."""

    def __init__(self, array: Any, path: Path) -> None:
        self.shape, self.ndim = tuple(array.shape), len(array.shape)
        self.dtype, self.size = np.dtype(np.uint8), math.prod(self.shape)
        self._inside, self._path = array.path, path
        self._array: Any = None

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        try:
            if self._array is None:  # the store that it was listed in may be closed by now
                zarr = import_zarr()
                is_zip = self._path.is_file()
                store = zarr.storage.ZipStore(str(self._path), mode="r") if is_zip else str(self._path)
                self._array = zarr.open_array(store, path=self._inside, mode="r")
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


def _whole(array: Any, key: str, path: Path) -> NDArray[Any]:
    """The array's content."""
    if array.dtype.kind == "f" and _are_images(array, key):
        images = np.empty(array.shape, np.uint8)
        if _fill_with_images(images, array):
            return images
    return np.asarray(array[...])


def _mapped(array: Any, key: str, path: Path) -> NDArray[Any]:
    """Images as an array that is mapped from a file beside the store, which is written if it is not there.

    Its name holds the store's size and time, so that a store that was replaced is unpacked again.
    """
    about = path.stat()
    stamp = f"{about.st_size:x}-{about.st_mtime_ns:x}"
    file = path.with_name(f"{path.name}.unpacked") / f"{Path(key).name}-{stamp}.npy"
    if not file.exists():
        logger.info("Unpacking %s of %s to %s, once.", key, path, file)
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file) as temporary:
            images: np.memmap[Any, Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                temporary, "w+", np.uint8, array.shape
            )
            if not _fill_with_images(images, array):
                raise DataError(
                    f"{path}: '{key}' holds images of {array.dtype} that are no whole numbers from 0 to 255; "
                    "store them as uint8."
                )
            images.flush()
    mapped: NDArray[Any] = np.load(file, mmap_mode="c")
    return mapped


def _are_images(array: Any, key: str) -> bool:
    return is_image(array.shape[1:]) and kind_of(key, array.dtype, array.shape[1:]) is Kind.IMAGE


def _fill_with_images(images: NDArray[Any], array: Any) -> bool:
    """Copy images, read a few at a time; False unless every value is a whole number in 0..255."""
    row = int(np.prod(array.shape[1:])) * array.dtype.itemsize
    rows = max(1, int(array.chunks[0]), _BLOCK_BYTES // max(1, row))
    for start in range(0, len(images), rows):
        block = np.asarray(array[start : start + rows])
        whole = (block >= 0) & (block <= 255) & (block == np.round(block))
        if block.dtype != np.uint8 and not whole.all():
            return False
        images[start : start + rows] = block
    return True


def _wanted(keys: Iterable[str], names: list[str], path: Path) -> list[str]:
    wanted = dict.fromkeys([*keys, "action", *(key for key in EPISODE_KEYS if key in names)])
    for key in wanted:
        if key not in names:
            raise DataError(f"{path} has no key '{key}'; it has {listed(names)}.")
    return list(wanted)


def listed(names: Iterable[str]) -> str:
    """The names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "none"

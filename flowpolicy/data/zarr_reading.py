"""The arrays of a zarr store as they stand on disk, with the damage that zarr overlooks refused."""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import first_line, reading_error
from flowpolicy.data.features import Kind, kind_of
from flowpolicy.data.image_codecs import register_codecs
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.errors import DataError
from flowpolicy.observations import is_image
from flowpolicy.storage import atomic_file

__all__ = ["first_line", "free_memory_bytes"]  # for those who knew them here
logger = logging.getLogger(__name__)

EPISODE_KEYS = ("reward", "terminated", "truncated")
COMPLETE = "all_chunks_written"
"""Attribute of arrays that were written with every chunk, so that a missing one is damage."""
MISSING_CHUNKS = ("refuse", "fill")
_BOMB_BYTES = 1 << 28
_BOMB_RATIO = 200
_MOST_CHUNKS = 1 << 22
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
        _check(array, f"data/{key}", self.path, missing_chunks)
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
            prefix = _group_in_zip(path)
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
            raise DataError(
                f"{path} holds images that need imagecodecs; run: pip install 'flowpolicy[images]'."
            ) from error
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
    _check(store.episode_ends, "meta/episode_ends", store.path)
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
    try:
        import zarr
    except ImportError as error:
        raise DataError(
            "Demonstration stores need zarr; install it with: pip install 'flowpolicy[train]'."
        ) from error
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
    _check(array, key, path)
    if array.dtype.kind == "f" and _are_images(array, key):
        images = np.empty(array.shape, np.uint8)
        if _fill_with_images(images, array):
            return images
    return np.asarray(array[...])


def _mapped(array: Any, key: str, path: Path) -> NDArray[Any]:
    """Images as an array that is mapped from a file beside the store, which is written if it is not there.

    Its name holds the store's size and time, so that a store that was replaced is unpacked again.
    """
    _check(array, key, path)
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


def _check(array: Any, key: str, path: Path, missing_chunks: str = "refuse") -> None:
    """Refuse what is no array of numbers, or has lost a part: zarr would fill a missing chunk in silence."""
    if not hasattr(array, "nchunks"):
        raise DataError(f"{path}: '{key}' is a group where an array is expected.")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
    if any("pickle" in repr(codec).lower() for codec in (*array.filters, *array.compressors)):
        raise DataError(
            f"{path}: '{key}' is stored as pickles, which can run code; store it as plain numbers."
        )
    _check_chunks(array, key, path, missing_chunks)
    _check_frames(array, key, path)


def _check_chunks(array: Any, key: str, path: Path, missing_chunks: str) -> None:
    """Tell chunks that were left out, since they hold the fill value alone, from chunks that were lost.

    zarr's default writer leaves the former out, and nothing on disk tells the two apart but their
    neighbours: a run of rows with the fill value seldom begins and ends where chunks do.
    """
    # zarr's own count of stored chunks fails in a zip where one key begins another ("pos", "pos_site").
    sizes = array.shards or array.chunks
    counts = [-(-length // size) for length, size in zip(array.shape, sizes, strict=True)]
    total = math.prod(counts)
    stored = {name for name, _, _ in _chunks(path, key)}
    missing = total - len(stored)
    gaps: set[int] | None = None
    if total <= _MOST_CHUNKS:  # else the names need not be listed, which takes for ever for an absurd shape
        places = {array.metadata.encode_chunk_key(index): index for index in np.ndindex(*counts)}
        lost = places.keys() - stored
        missing, gaps = len(lost), {places[name][0] for name in lost if places[name]}
    if missing <= 0:
        return
    may_fill = array.fill_value is not None and not array.attrs.get(COMPLETE)
    if (
        may_fill
        and gaps is not None
        and (missing_chunks == "fill" or _is_left_out(array, key, gaps, counts[0]))
    ):
        logger.warning(
            "%s: %d of %d chunks of '%s' are not stored; they are read as the declared fill value, %s.",
            path, missing, total, key, array.fill_value,
        )  # fmt: skip
        return
    remedy = "copy the store again"
    if may_fill and gaps is not None:
        remedy += ", or, if they held nothing but the fill value, import it with options.missing_chunks=fill"
    raise DataError(f"{path}: {missing} of {total} chunks of '{key}' are missing; {remedy}.")


def _is_left_out(array: Any, key: str, gaps: set[int], count: int) -> bool:
    """Whether the rows next to the missing chunks hold the fill value too."""
    if len(gaps) == count:  # nothing is stored: usual for rewards and flags, and for nothing else
        return Path(key).name in (*EPISODE_KEYS, "done") or array.dtype.kind == "b"
    size = (array.shards or array.chunks)[0]
    rows = {gap * size - 1 for gap in gaps if gap and gap - 1 not in gaps}
    rows |= {(gap + 1) * size for gap in gaps if gap + 1 < count and gap + 1 not in gaps}
    return all(bool((np.asarray(array[row]) == array.fill_value).all()) for row in sorted(rows))


def _check_frames(array: Any, key: str, path: Path) -> None:
    """Refuse Blosc chunks shorter or longer than their header says.

    Blosc itself does not compare the two, and reads whatever memory lies behind a chunk that was cut off.
    """
    if not array.compressors or "blosc" not in type(array.compressors[-1]).__name__.lower() or array.shards:
        return
    for name, size, header in _chunks(path, key):
        if len(header) < 16 or int.from_bytes(header[12:16], "little") != size:
            raise DataError(f"{path}: chunk '{name}' of '{key}' is cut off or damaged; copy the store again.")


def _chunks(path: Path, key: str) -> Iterator[tuple[str, int, bytes]]:
    """Name, size in bytes and first 16 bytes of each stored chunk of the array ``key``."""
    if path.is_dir():
        for file in sorted((path / key).rglob("*")):
            if file.is_file() and not _is_metadata(file.name):
                with file.open("rb") as content:
                    yield file.relative_to(path / key).as_posix(), file.stat().st_size, content.read(16)
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _, found, name = f"/{member.filename}".partition(f"/{key}/")
            if found and name and not member.is_dir() and not _is_metadata(name):
                with archive.open(member) as content:
                    yield name, member.file_size, content.read(16)


def _is_metadata(name: str) -> bool:
    return name.startswith(".") or name == "zarr.json"


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


def _group_in_zip(path: Path) -> str:
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
        for member in members:
            if member.filename.startswith("/") or ".." in Path(member.filename.replace("\\", "/")).parts:
                raise DataError(
                    f"{path} holds the unsafe name '{member.filename}'; get it from a source you trust."
                )
        unpacked = sum(member.file_size for member in members)
        packed = max(1, sum(member.compress_size for member in members))
        if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
            raise DataError(
                f"{path} would unpack to {unpacked / 1e9:.1f} GB, {unpacked // packed} times its size; "
                "a store is compressed chunk by chunk and zipped without compression."
            )
        broken = file.testzip()
        if broken is not None:
            raise DataError(f"{path} is damaged at '{broken}'; copy it again.")
        roots = {
            member.filename.partition("meta/episode_ends/")[0].rstrip("/")
            for member in members
            if "meta/episode_ends/" in member.filename
        }
    if not roots:
        raise DataError(
            f"{path} lacks meta/episode_ends; a store has data/<key> arrays and meta/episode_ends."
        )
    if len(roots) != 1:
        raise DataError(f"{path} holds {len(roots)} demonstration stores; it must hold exactly one.")
    return roots.pop()


def listed(names: Iterable[str]) -> str:
    """The names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "none"

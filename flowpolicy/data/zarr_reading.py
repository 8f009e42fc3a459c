"""The arrays of a zarr store as they stand on disk, with the damage that zarr overlooks refused."""

from __future__ import annotations

import importlib.resources
import logging
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.image_codecs import register_codecs
from flowpolicy.errors import DataError
from flowpolicy.observations import is_image
from flowpolicy.storage import atomic_file

logger = logging.getLogger(__name__)

EPISODE_KEYS = ("reward", "terminated", "truncated")
_BOMB_BYTES = 1 << 28
_BOMB_RATIO = 200


def read_unchecked(
    path: Path | str, keys: Iterable[str] | None = None, image_memory_bytes: int | None = None
) -> tuple[dict[str, NDArray[Any]], NDArray[Any], dict[str, Any]]:
    """The arrays, episode ends and attributes of a store as they stand, for looking at a broken one.

    Images of a key that take more than ``image_memory_bytes`` are mapped from a file; None: none is.

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
        names = sorted(group["data"].array_keys())
        wanted = names if keys is None else _wanted(keys, names, path)
        arrays = {}
        for name in wanted:
            array = group[f"data/{name}"]
            is_large = image_memory_bytes is not None and is_image(array.shape[1:])
            is_large = is_large and int(np.prod(array.shape)) > (image_memory_bytes or 0)
            read = _mapped if is_large else _whole
            arrays[name] = read(array, f"data/{name}", path)
        ends = _whole(group["meta/episode_ends"], "meta/episode_ends", path)
        return arrays, ends, dict(group.attrs)
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
        raise DataError(
            f"{path} is damaged or not a zarr store ({first_line(error)}); copy it again."
        ) from error
    finally:
        if store is not None:
            store.close()


def free_memory_bytes() -> int:
    """What the machine can still give; a great number where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not on every system
        return 1 << 40


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
    if array.dtype.kind == "f" and is_image(array.shape[1:]):
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


def _check(array: Any, key: str, path: Path) -> None:
    """Refuse what is no array of numbers, or has lost a part: zarr would fill a missing chunk with zeros."""
    if not hasattr(array, "nchunks"):
        raise DataError(f"{path}: '{key}' is a group where an array is expected.")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
    if any("pickle" in repr(codec).lower() for codec in (*array.filters, *array.compressors)):
        raise DataError(
            f"{path}: '{key}' is stored as pickles, which can run code; store it as plain numbers."
        )
    # zarr's own count of stored chunks fails in a zip where one key begins another ("pos", "pos_site").
    sizes = array.shards or array.chunks
    counts = [-(-length // size) for length, size in zip(array.shape, sizes, strict=True)]
    stored = {name for name, _, _ in _chunks(path, key)}
    missing = math.prod(counts) - len(stored)
    if missing <= 0:  # else the names need not be listed, which takes for ever for an absurd shape
        names = {array.metadata.encode_chunk_key(index) for index in np.ndindex(*counts)}
        missing = len(names - stored)
    if missing:
        raise DataError(
            f"{path}: {missing} of {math.prod(counts)} chunks of '{key}' are missing; copy the store again."
        )
    _check_frames(array, key, path)


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
    rows = max(64, int(array.chunks[0]))
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


def first_line(error: BaseException, limit: int = 160) -> str:
    """The gist of another library's error, its first sentence, to stand in brackets inside another one."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().partition(". ")[0].rstrip(".:") if lines else ""
    text = text or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"

"""Damage that zarr overlooks: chunks that were lost or cut off, pickles, zips that are not what they say."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.data.keys import PER_STEP_KEYS
from flowpolicy.errors import DataError

logger = logging.getLogger(__name__)

COMPLETE = "all_chunks_written"
"""Attribute of arrays that were written with every chunk, so that a missing one is damage."""
MISSING_CHUNKS = ("refuse", "fill")
_BOMB_BYTES = 1 << 28
_BOMB_RATIO = 200
_MOST_CHUNKS = 1 << 22


def check_array(array: Any, key: str, path: Path, missing_chunks: str = "refuse") -> None:
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
        return Path(key).name in PER_STEP_KEYS or array.dtype.kind == "b"
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


def names_below(path: Path, group: str) -> list[str]:
    """What lies in a group of a store, by name; hidden files are left out."""
    if path.is_dir():
        names = {file.name for file in (path / group).iterdir()}
    else:
        with zipfile.ZipFile(path) as archive:
            inside = [
                name.removeprefix(f"{group}/") for name in archive.namelist() if name.startswith(f"{group}/")
            ]
        names = {name.partition("/")[0] for name in inside}
    return sorted(name for name in names if name and not _is_metadata(name))


def _is_metadata(name: str) -> bool:
    return name.startswith(".") or name == "zarr.json"


def group_in_zip(path: Path) -> str:
    """Where in a zip its one store lies.

    Raises:
        DataError: a damaged zip, one that would unpack to an absurd size or outside its place, or without
            exactly one store.
    """
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

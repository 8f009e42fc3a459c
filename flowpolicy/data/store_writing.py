"""A store written block by block: it appears under its name when it is whole, or not at all."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.image_codecs import image_codec as codec_for_images
from flowpolicy.data.keys import NOT_OBSERVED
from flowpolicy.data.unfinished import NOTE, complete_rows, folder_of, json_form
from flowpolicy.data.zarr_checks import COMPLETE
from flowpolicy.data.zarr_reading import import_zarr
from flowpolicy.errors import DataError, FlowPolicyError
from flowpolicy.features import Feature
from flowpolicy.features.stored import KINDS, stored_feature
from flowpolicy.files.storage import atomic_file, sync_since, write_json
from flowpolicy.runs.interrupts import held_interrupts
from flowpolicy.settings import require

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_LEVEL, _GROWING_LEVEL = 6, 1  # of compression: 7 takes twice as long for 1% less; cameras want it at once
NOTED_EVERY_S = 30.0
"""Between two notes of how far the writing has come; more where a note itself takes long."""
_SHARE = 20  # a note may take a twentieth of the time between two


def check_new(path: Path | str) -> Path:
    """``path``, expanded; refused where something stands there already."""
    path = Path(str(path)).expanduser()
    if path.exists() or path.is_symlink():
        raise DataError(f"{path} exists already; remove it or choose another name.")
    return path


class StoreWriter:
    """Takes blocks of rows of several keys and writes them in whole chunks; see :func:`store_writer`.

    Args:
        folder: of the store.
        steps: rows that every key will have; None lets the arrays grow with what they are given.
        zarr_format: 2 or 3.
        codec: of images; None compresses them as everything else.
        check: called between blocks; raises what is to end the writing, as Ctrl-C does.
        rows: of every key that the folder holds already; they stay, and new ones follow.
        work: noted in the folder with the rows that are complete; None notes nothing.

    Attributes:
        rows: of every key so far; lowered before the first block, later ones are written anew.
        attributes: of the store.
    """

    def __init__(
        self,
        folder: Path,
        steps: int | None,
        zarr_format: int,
        codec: Any,
        check: Callable[[], None],
        rows: int = 0,
        work: Mapping[str, Any] | None = None,
    ) -> None:
        self._zarr, self._folder, self._format = import_zarr(), folder, zarr_format
        self._steps, self._codec, self._work, self.check = steps, codec, work, check
        self._columns: dict[str, _Pending] = {}
        self._features: dict[str, Feature] = {}
        self._synced, self._next_note = 0, time.monotonic() + NOTED_EVERY_S
        self.rows = rows
        self.attributes: dict[str, Any] = {}
        for file in folder.rglob("*"):  # what zarr, or a note, was writing when it was killed
            if (file.suffix == ".partial" or ".tmp-" in file.name) and file.is_file():
                file.unlink()

    def append(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Take the next rows of each key, ``(rows, ...)``; the first decide each key's shape and type, and
        its kind unless the attributes declare that already.

        Ctrl-C takes effect here.
        """
        self.check()
        for key, values in rows.items():
            if key not in self._columns:
                feature = stored_feature(key, values.dtype, values.shape[1:], self.attributes, self._folder)
                self._features[key] = feature
                self._columns[key] = self._create(f"data/{key}", values, self._steps, feature.is_frame)
            self._columns[key].append(values)
        self.rows += len(next(iter(rows.values())))
        if self._work is not None and time.monotonic() >= self._next_note:
            began = time.monotonic()
            self.note(NOTE, {"work": json_form(self._work), "rows": self.rows})
            took = time.monotonic() - began
            self._next_note = time.monotonic() + max(NOTED_EVERY_S, _SHARE * took)

    def note(self, name: str, content: dict[str, Any]) -> None:
        """Put all rows so far on disk, and when they are there, ``content`` into a JSON file beside them."""
        self.flush()
        self._synced = sync_since(self._folder, self._synced)
        write_json(self._folder / name, content)

    def flush(self) -> None:
        """Write what is pending, and note the kinds of what was written."""
        for column in self._columns.values():
            column.flush(whole=False)
        written = {
            key: feature.declaration() for key, feature in self._features.items() if key not in NOT_OBSERVED
        }
        self.attributes[KINDS] = {**self.attributes.get(KINDS, {}), **written}

    def finish(self, episode_ends: NDArray[Any]) -> None:
        """Write what is pending, the ends of the episodes and the attributes."""
        self.flush()
        shutil.rmtree(self._folder / "meta", ignore_errors=True)  # of a writer that was killed right here
        ends = self._create("meta/episode_ends", episode_ends, len(episode_ends))
        ends.append(episode_ends)
        ends.flush(whole=False)
        group = self._zarr.open_group(str(self._folder), mode="a", zarr_format=self._format)
        group.attrs.update(self.attributes)
        self.check()

    def _create(self, name: str, like: NDArray[Any], steps: int | None, is_frame: bool = False) -> _Pending:
        if (self._folder / name).exists():
            with self._zarr.config.set({"array.write_empty_chunks": True}):  # is no part of what is stored
                array = self._zarr.open_array(str(self._folder), path=name, mode="r+")
            return _Pending(array, array.chunks[0], self.rows)
        row = max(1, int(np.prod(like.shape[1:], dtype=np.int64)) * like.dtype.itemsize)
        rows = max(1, _CHUNK_BYTES // row)
        rows = rows if steps is None else max(1, min(steps, rows))
        level = _GROWING_LEVEL if steps is None else _LEVEL
        if self._codec is not None and is_frame and like.dtype == np.uint8:
            rows, compressors = 1, self._codec
        elif self._format == 2:
            import numcodecs

            compressors = numcodecs.Blosc("zstd", clevel=level, shuffle=numcodecs.Blosc.BITSHUFFLE)
        else:
            from zarr.codecs import BloscCodec

            compressors = BloscCodec(cname="zstd", clevel=level, shuffle="bitshuffle")
        array = self._zarr.create_array(
            str(self._folder),
            name=name,
            shape=(steps or 0, *like.shape[1:]),
            dtype=like.dtype,
            chunks=(rows, *like.shape[1:]),
            compressors=compressors,
            zarr_format=self._format,
            attributes={COMPLETE: True},
            config={"write_empty_chunks": True},  # a chunk of zeros is written too: a missing one is damage
        )
        return _Pending(array, rows)


@dataclass
class _Pending:
    """An array on disk and the rows that do not fill its next chunk yet."""

    array: Any
    chunk: int
    written: int = 0
    blocks: list[NDArray[Any]] = field(default_factory=list)
    rows: int = 0

    def append(self, values: NDArray[Any]) -> None:
        self.blocks.append(values)
        self.rows += len(values)
        if self.written % self.chunk + self.rows >= self.chunk:
            self.flush()

    def flush(self, whole: bool = True) -> None:
        """Write whole chunks, or all there is, one chunk at a time.

        zarr writes many side by side; where one fails (a full disk) the others would go on after the error
        and bring a removed temporary store back.
        """
        end = self.written + self.rows
        end -= end % self.chunk if whole else 0
        if end > self.array.shape[0]:
            self.array.resize((end, *self.array.shape[1:]))
        values = self.blocks[0] if len(self.blocks) == 1 else np.concatenate(self.blocks or [np.empty(0)])
        begin = self.written
        while self.written < end:
            last = min(end, self.written + self.chunk - self.written % self.chunk)
            self.array[self.written : last] = values[self.written - begin : last - begin]
            self.written = last
        rest = values[end - begin :]
        self.blocks = [rest.copy()] if len(rest) else []  # a view would keep the whole block in memory
        self.rows = len(rest)


@contextlib.contextmanager
def store_writer(
    path: Path | str,
    steps: int,
    *,
    zarr_format: int = 2,
    image_codec: str = "zstd",
    work: Mapping[str, Any] | None = None,
) -> Iterator[StoreWriter]:
    """Yield a writer; what it was given stands at ``path`` when the block ends without error.

    On an error, or Ctrl-C, nothing stays behind, not even a folder that was made for the store. A second
    writer of the same path is refused. Where ``work`` is given, what it had written until it was killed, or
    until Ctrl-C, stays in a hidden folder, and a writer of the same work goes on after ``writer.rows``.

    Args:
        path: the new store; a zip where it ends in ``.zip``.
        steps: rows that every key will have.
        zarr_format: 2 or 3.
        image_codec: ``zstd`` or ``jpeg2000``; see :mod:`flowpolicy.data.image_codecs`.
        work: what is written, by name; values as JSON has them, or told apart by their text.

    Raises:
        DataError: ``path`` exists, is being written, or zarr is missing.
        FlowPolicyError: the disk is full or the place not writable.
    """
    import_zarr()
    codec = codec_for_images(image_codec)
    require(codec is None or zarr_format == 2, "zarr_format", zarr_format, "2 with another codec than zstd")
    path = check_new(path)
    if zarr_format not in (2, 3):
        raise DataError(f"zarr_format is {zarr_format}; it must be 2 or 3.")
    with (
        held_interrupts() as check,
        _only_if_whole(path.parent),
        sole_writer(path),
        atomic_file(path) as temporary,
    ):
        folder = folder_of(path)
        note = folder / NOTE
        rows = complete_rows(path, work)
        try:
            yield StoreWriter(folder, steps, zarr_format, codec, check, rows, work)
            note.unlink(missing_ok=True)
            if path.suffix == ".zip":
                _pack(folder, temporary, check)
            else:
                folder.rename(temporary)
        except KeyboardInterrupt:
            if note.exists():
                logger.warning("The same command goes on with %s; without it, remove %s.", path, folder)
            raise
        except BaseException:
            note.unlink(missing_ok=True)
            raise
        finally:
            if not note.exists():
                shutil.rmtree(folder, ignore_errors=True)


def _pack(folder: Path, target: Path, check: Callable[[], None]) -> None:
    """Move the files of a folder into a zip, uncompressed as their chunks are compressed already."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            check()
            archive.write(file, file.relative_to(folder).as_posix())
            file.unlink()  # the disk need not hold everything twice


@contextlib.contextmanager
def _only_if_whole(folder: Path) -> Iterator[None]:
    """Take away the folders that were made for a store which then was not written."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Refuse a path that another program, or thread, is writing to."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        lock.acquire()
    except Timeout as error:
        raise DataError(f"Another program is writing {path}; wait for it, or choose another name.") from error
    except OSError as error:
        raise FlowPolicyError(
            f"{path} cannot be written ({error.strerror or error}); choose a writable place."
        ) from error
    try:
        check_new(path)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

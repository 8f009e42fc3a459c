"""A store that grows while a run goes on, episode by episode; what has ended is safe.

The store grows in a hidden folder beside its path, ``.<name>.recording``. After each episode everything of it
is on disk, and ``recording.json`` there says where it ends. The finished store is that folder, renamed. After
a program that was killed, :func:`recover` makes a store of the episodes that had ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.store import Demonstrations
from flowpolicy.data.store_writing import StoreWriter, check_new, sole_writer
from flowpolicy.data.unfinished import json_form
from flowpolicy.data.zarr_reading import import_zarr, open_store
from flowpolicy.errors import DataError
from flowpolicy.features.stored import KINDS
from flowpolicy.files.reading import read_json

_PROGRESS = "recording.json"
_FORMAT = 2  # of zarr


class RecordedStore:
    """Takes the rows of one episode after another.

    Memory holds at most a chunk of each key, a megabyte. One writer at a time.

    Args:
        path: of the store, a folder that does not exist yet.
        attributes: of the store; ``masks`` is made from the episodes' marks.
        resume: go on with the episodes that a killed run of the same attributes left.

    Raises:
        DataError: something stands at ``path``, it is being written, or a run that was killed had been
            recording there: its episodes then stand at ``path``, or are gone on with.
    """

    def __init__(self, path: Path | str, attributes: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = check_new(path)
        if self.path.suffix == ".zip":
            raise DataError(f"{self.path}: a recording grows in a folder; choose a name without .zip.")
        self._opened = ExitStack()
        self._opened.enter_context(sole_writer(self.path))
        try:
            self._folder = _folder_of(self.path)
            earlier = self._earlier(attributes) if resume else {}
            if self._folder.exists() and not earlier:
                count = recover(self.path)
                if count:
                    raise DataError(
                        f"A run that was killed had recorded {count} episodes for {self.path}, which stand "
                        "there now; choose another name for this run."
                    )
            self._folder.mkdir(exist_ok=bool(earlier))
        except BaseException:
            self._opened.close()
            raise
        self._ends: list[int] = earlier.get("episode_ends", [])
        self._masks: dict[str, list[int]] = earlier.get("attributes", {}).get("masks", {})
        rows = self._ends[-1] if earlier else 0
        self._writer = StoreWriter(self._folder, None, _FORMAT, None, lambda: None, rows)
        self._writer.attributes.update(attributes)

    def _earlier(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """What a killed run has noted of its episodes; nothing where none had ended."""
        if not (self._folder / _PROGRESS).exists():
            return {}
        content = read_json(self._folder / _PROGRESS)
        for name, value in json_form(attributes).items():
            if name != KINDS and content["attributes"].get(name) != value:
                raise DataError(
                    f"A run that was killed had recorded for {self.path} with another '{name}'; choose "
                    f"another name for this run, or remove {self._folder}."
                )
        return content

    def __enter__(self) -> RecordedStore:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Close the store, or after an error leave its episodes for one that resumes."""
        if error is None:
            self.close()
        else:
            self._opened.close()

    @property
    def num_episodes(self) -> int:
        """Episodes that have ended."""
        return len(self._ends)

    def append(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Take the next rows of the episode, key -> ``(n, ...)``."""
        self._writer.append(rows)

    def end_episode(self, marks: tuple[str, ...] = (), *, sync: bool = True) -> None:
        """The episode is over: put it on disk, under these marks; nothing happens to one without a row.

        Without ``sync`` it is on disk when a later one is, or the store is closed.
        """
        if self._writer.rows == (self._ends[-1] if self._ends else 0):
            return
        for mark in marks:
            self._masks.setdefault(mark, []).append(len(self._ends))
        self._ends.append(self._writer.rows)
        if sync:
            self._sync()

    def _sync(self) -> None:
        self._writer.flush()  # which completes the attributes
        attributes = {**self._writer.attributes, "masks": self._masks}
        self._writer.note(_PROGRESS, {"episode_ends": self._ends, "attributes": attributes})

    def close(self) -> Path | None:
        """Give the store its name; its path, or None where no episode has ended."""
        try:
            if self._ends:
                self._sync()
            return self.path if _complete(self._folder, self.path) else None
        finally:
            self._opened.close()


def num_recorded(path: Path | str) -> int:
    """How many episodes of a recording have ended, which may be under way."""
    return len(_ended(Path(path))[1])


def recorded_episodes(path: Path | str, first: int = 0) -> Demonstrations | None:
    """The episodes that have ended of a recording, which may be under way, from number ``first`` on.

    They are read with all their keys; None where there is none yet, or where the recording was finished while
    it was read: it is then there to be read again.

    Raises:
        DataError: a value that is not finite, or a recording that is damaged.
    """
    path = Path(path)
    is_growing, folder = not path.exists(), _folder_of(path)
    try:
        place, ends, attributes = _ended(path)
        if first >= len(ends):
            return None
        begin = int(ends[first - 1]) if first else 0
        data = import_zarr().open_group(str(place), mode="r", zarr_format=_FORMAT)["data"]
        arrays = {key: np.asarray(array[begin : int(ends[-1])]) for key, array in data.arrays()}
    except Exception:
        if is_growing and not folder.exists():  # it was renamed
            return None
        raise
    if is_growing and not folder.exists():  # zarr takes what is missing for zeros
        return None
    masks = {
        name: [number - first for number in numbers if number >= first]
        for name, numbers in attributes.get("masks", {}).items()
    }
    return Demonstrations(arrays, ends[first:] - begin, {**attributes, "masks": masks}, str(path))


def _ended(path: Path) -> tuple[Path, NDArray[Any], dict[str, Any]]:
    """Where a recording lies, the ends of its episodes, and its attributes."""
    if path.exists():
        with open_store(path) as store:
            return path, store.read_ends().astype(np.int64), store.attributes
    folder = _folder_of(path)
    if not (folder / _PROGRESS).exists():
        return folder, np.zeros(0, np.int64), {}
    content = read_json(folder / _PROGRESS)
    return folder, np.asarray(content["episode_ends"], dtype=np.int64), content["attributes"]


def recover(path: Path | str) -> int:
    """Make a store at ``path`` of the episodes that a killed run had finished, if any; their number."""
    folder = _folder_of(Path(path))
    return _complete(folder, Path(path)) if folder.exists() else 0


def _complete(folder: Path, path: Path) -> int:
    """Cut the arrays after the last episode that has ended, and rename; the number of episodes."""
    progress = folder / _PROGRESS
    if not progress.exists():
        shutil.rmtree(folder)
        return 0
    content = read_json(progress)
    ends = np.asarray(content["episode_ends"], dtype=np.int64)
    data = import_zarr().open_group(str(folder), mode="a", zarr_format=_FORMAT)["data"]
    for _, array in data.arrays():
        array.resize((int(ends[-1]), *array.shape[1:]))
    writer = StoreWriter(folder, len(ends), _FORMAT, None, lambda: None)
    writer.attributes.update(content["attributes"])
    writer.finish(ends)
    folder.rename(path)
    (path / _PROGRESS).unlink()
    return len(ends)


def _folder_of(path: Path) -> Path:
    path = path.expanduser()
    return path.with_name(f".{path.name}.recording")

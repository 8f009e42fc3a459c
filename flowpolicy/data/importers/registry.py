"""The registry of formats: each importer registers a name and optionally how to recognise its files."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from flowpolicy.data.causes import first_line, reading_error
from flowpolicy.data.importers.hdf5 import open_hdf5
from flowpolicy.data.importers.source import Source
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.settings import choose, unknown_key

P = ParamSpec("P")
_HDF5_HEAD = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Contents:
    """What a file or folder shows at a glance, for an importer to recognise it by."""

    path: Path

    def has(self, pattern: str) -> bool:
        """Whether it is a folder with something at this path or pattern: ``meta/info.json``, ``*.csv``."""
        return self.path.is_dir() and any(self.path.glob(pattern))

    @functools.cached_property
    def head(self) -> bytes:
        """The first eight bytes of a file; empty for a folder."""
        return b"" if self.path.is_dir() else self._read_head()

    @functools.cached_property
    def hdf5(self) -> frozenset[str]:
        """Names of the groups and arrays at the top of an HDF5 file; none for another file."""
        if self.head != _HDF5_HEAD:
            return frozenset()
        with open_hdf5(self.path) as file:
            return frozenset(file)

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip, or was one before it was cut off."""
        if self.path.is_dir() or self.head == _HDF5_HEAD:
            return False
        return self.head.startswith(b"PK") or zipfile.is_zipfile(self.path)

    def _read_head(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                head = file.read(8)
        except OSError as error:
            raise reading_error(error, self.path, "cannot be read") from error
        if not head:
            raise DataError(f"{self.path} is empty; copy it again.")
        return head


@dataclass(frozen=True)
class Importer:
    """A format; see :func:`importer`."""

    open: Callable[..., AbstractContextManager[Source]]
    detect: Callable[[Contents], bool]

    @property
    def options(self) -> list[str]:
        """Names of the keyword arguments of ``open`` beyond the path."""
        return list(inspect.signature(self.open).parameters)[1:]


FORMATS: dict[str, Importer] = {}
"""By name. Detection asks the one that was entered last first."""


def importer(
    name: str, detect: Callable[[Contents], bool] = lambda contents: False
) -> Callable[[Callable[P, Iterator[Source]]], Callable[P, AbstractContextManager[Source]]]:
    """Enter a generator function as the importer of a format; an earlier one of that name gives way.

    The function takes a path, and the format's options as keyword arguments; it opens the file, yields one
    :class:`Source`, and closes the file when it is resumed.

    Args:
        name: of the format, as in ``format=name``.
        detect: whether a file or folder looks like this format, for ``format=auto``.
    """

    def enter(function: Callable[P, Iterator[Source]]) -> Callable[P, AbstractContextManager[Source]]:
        opened = contextlib.contextmanager(function)
        FORMATS.pop(name, None)
        FORMATS[name] = Importer(opened, detect)
        return opened

    return enter


@contextlib.contextmanager
def open_source(
    source: Path | str, format: str = "auto", options: Mapping[str, Any] | None = None
) -> Iterator[Source]:
    """Yield the source at a path, of which nothing but its declaration has been read.

    Args:
        source: file, folder, or (Minari, LeRobot) dataset id.
        format: a name in :data:`FORMATS`, or ``auto``; ``my_module:name`` imports ``my_module`` first, which
            enters importers of your own.
        options: keyword arguments of the format's importer.

    Raises:
        DataError: what the importer finds wrong.
        ConfigError: an unknown format or option, or a module that cannot be imported.
    """
    path = resolve_path(source)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is no ordinary file; give a file or a folder.")
    module, _, name = format.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises
            raise ConfigError(
                f"format '{format}' cannot be found, as module '{module}' cannot be imported "
                f"({first_line(error)}); is its folder in PYTHONPATH?"
            ) from error
    name = detect_format(path) if name == "auto" else name
    chosen = choose(FORMATS, name, "format")
    for option in options or {}:
        if option not in chosen.options:
            raise ConfigError(
                unknown_key(f"options.{option}", [f"options.{known}" for known in chosen.options])
            )
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(chosen.open(path, **(options or {})))
        except Exception as error:  # whatever an importer's libraries raise
            raise reading_error(error, path, f"cannot be read as {name}") from error
        opened.attributes.setdefault("imported_from", path.name)
        opened.attributes.setdefault("imported_format", name)
        yield opened


def detect_format(source: Path | str) -> str:
    """The name in :data:`FORMATS` that fits the file or folder.

    Raises:
        DataError: nothing there, or a format that is not recognised.
    """
    path = resolve_path(source)
    try:
        is_there = path.exists()
    except OSError as error:
        raise reading_error(error, path, "cannot be looked at") from error
    if not is_there:
        raise DataError(
            f"There is nothing at {source}; check the path, or say format=minari or lerobot for an id."
        )
    contents = Contents(path)
    for name, known in reversed(FORMATS.items()):
        if known.detect(contents):
            return name
    raise DataError(
        f"{path} is of no format known here; say which of {', '.join(FORMATS)} it is with format=...."
    )

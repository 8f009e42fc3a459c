"""What an import is told by, so that one that was killed is gone on with and another one is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flowpolicy
from flowpolicy.data.zarr_reading import resolve_path

FILES = "the source's files"


def description(source: Path | str, where: str, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what the import writes, by name.

    Args:
        source: as the user gave it.
        where: it was found; a dataset of the Hub lies in a folder that is named after its revision.
        out: the store, which may lie in the source's folder.
        settings: those that are None are as good as not given.
    """
    path = resolve_path(source)
    given = {name: value for name, value in settings.items() if value is not None}
    files = _digest(path.absolute(), out.absolute()) if path.exists() else ""
    about = {"source": str(source), "where": where, FILES: files, "flowpolicy": flowpolicy.__version__}
    return about | given


def _digest(path: Path, out: Path) -> str:
    """Of the names, sizes and times of a folder's files; of one file and the JSON files beside it."""
    digest = hashlib.sha256()
    for file in sorted(_files(path)):
        if not any(part.startswith(f".{out.name}.") for part in file.parts):
            about = file.stat()
            digest.update(f"{file.relative_to(path.parent)}:{about.st_size}:{about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    else:
        yield path
        yield from (file for file in path.parent.glob("*.json") if file.is_file())

"""ALOHA's and ACT's recordings: a folder of ``episode_<i>.hdf5``, one episode each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.episodes import natural_order
from flowpolicy.data.importers.hdf5 import (
    Hdf5Episodes,
    feature_of,
    hdf5_explained,
    list_features,
    open_hdf5,
)
from flowpolicy.data.importers.source import Feature, Source
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind

_PATTERN = "episode_*.hdf5"


@contextlib.contextmanager
def open_aloha(path: Path | str) -> Iterator[Source]:
    """Files with ``/action`` and ``/observations/{qpos, qvel, effort, images/<camera>}``.

    ``observations/qpos`` becomes ``qpos``, ``observations/images/<camera>`` becomes the name of the camera.
    Other arrays at the top (``base_action``) are read where they are named. Images that were compressed
    while recording (the attribute ``compress``) are not decoded and are left out, with a word.

    Args:
        path: the folder, or one of its files.

    Raises:
        DataError: no such file, or a damaged one.
    """
    path = resolve_path(path)
    names = natural_order([file.name for file in path.glob(_PATTERN)]) if path.is_dir() else [path.name]
    folder = path if path.is_dir() else path.parent
    if not names:
        raise DataError(f"{path} has no {_PATTERN}; give the folder of the recordings.")
    files = [folder / name for name in names]
    with hdf5_explained(path), _Files(files) as opened:
        features: dict[str, Feature] = {}
        for number, file in enumerate(files):
            found = list_features([opened.open(number)], file, _describer(opened.open(number)))
            features = {**found, **features}
        attributes: dict[str, Any] = {"imported_from": path.name}
        simulated = opened.open(0).attrs.get("sim")
        if simulated is not None:
            attributes["simulated"] = bool(simulated)
        yield Hdf5Episodes(
            str(path),
            features,
            [Path(name).stem for name in names],
            attributes,
            action="action",
            group=opened.open,
            path=lambda number: files[number],
        )


def _describer(file: Any) -> Any:
    compressed = bool(file.attrs.get("compress", False)) or "compress_len" in file

    def describe(name: str, node: Any) -> Feature:
        head, _, rest = name.partition("/")
        default = name == "action" or (head == "observations" and bool(rest))
        key = (rest if head == "observations" else name).removeprefix("images/").replace("/", ".")
        feature = feature_of(name, key, node, default=default)
        is_image = rest.startswith("images/") and node is not None
        # One row of bytes per image, or a text of variable length: a JPEG file, padded to the longest.
        if is_image and (compressed or feature.kind == Kind.TEXT or len(feature.shape or ()) < 2):
            return Feature(name, key, Kind.ENCODED, feature.shape, default)
        return feature

    return describe


class _Files:
    """The episodes' files, of which one is open at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths, self._stack, self._number = paths, contextlib.ExitStack(), -1
        self._file: Any = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, number: int) -> Any:
        """The open file of an episode; the one before is closed."""
        if number != self._number:
            self._stack.close()
            self._file = self._stack.enter_context(open_hdf5(self._paths[number]))
            self._number = number
        return self._file

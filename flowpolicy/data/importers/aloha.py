"""ALOHA's and ACT's recordings: a folder of ``episode_<i>.hdf5``, one episode each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.hdf5 import feature_of, hdf5_explained, list_features, open_column, open_hdf5
from flowpolicy.data.importers.registry import Contents, importer
from flowpolicy.data.importers.source import ArraySource, Feature, Source, natural_order
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind

_PATTERN = "episode_*.hdf5"


def _is_aloha(contents: Contents) -> bool:
    return contents.has(_PATTERN) or contents.hdf5 >= {"action", "observations"}


@importer("aloha", _is_aloha)
def open_aloha(path: Path) -> Iterator[Source]:
    """Files with ``/action`` and ``/observations/{qpos, qvel, effort, images/<camera>}``.

    ``observations/qpos`` becomes ``qpos``, ``observations/images/<camera>`` becomes the name of the camera.
    Other arrays at the top (``base_action``) are read where they are named. Images that were compressed
    while recording (the attribute ``compress``) are not decoded and are left out, with a word.

    Args:
        path: the folder, or one of its files.

    Raises:
        DataError: no such file, or a damaged one.
    """
    folder = path if path.is_dir() else path.parent
    names = natural_order([file.name for file in path.glob(_PATTERN)]) if path.is_dir() else [path.name]
    if not names:
        raise DataError(f"{path} has no {_PATTERN}; give the folder of the recordings.")
    files = [folder / name for name in names]
    opened: dict[int, Any] = {}  # one file at a time
    with hdf5_explained(path), contextlib.ExitStack() as stack:

        def episode(number: int) -> Any:
            if number not in opened:
                stack.close()
                opened.clear()
                opened[number] = stack.enter_context(open_hdf5(files[number]))
            return opened[number]

        features: dict[str, Feature] = {}
        for number, file in enumerate(files):
            content = episode(number)
            compressed = bool(content.attrs.get("compress", False)) or "compress_len" in content
            found = list_features([content], file, lambda name, node: _feature(name, node, compressed))  # noqa: B023
            features = found | features
        simulated = episode(0).attrs.get("sim")
        yield ArraySource(
            str(path),
            features,
            [Path(name).stem for name in names],
            {} if simulated is None else {"simulated": bool(simulated)},
            action="action",
            rows=lambda number, name: open_column(episode(number), features[name], files[number]),
        )


def _feature(name: str, node: Any, compressed: bool) -> Feature:
    head, _, rest = name.partition("/")
    default = name == "action" or (head == "observations" and bool(rest))
    key = (rest if head == "observations" else name).removeprefix("images/").replace("/", ".")
    feature = feature_of(name, key, node, default=default)
    is_image = rest.startswith("images/") and node is not None
    # One row of bytes per image, or a text of variable length: a JPEG file, padded to the longest.
    if is_image and (compressed or feature.kind == Kind.TEXT or len(feature.shape or ()) < 2):
        return Feature(name, key, Kind.ENCODED, feature.shape, default)
    return feature

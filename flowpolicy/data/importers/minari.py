"""Minari's own layout on disk: ``data/main_data.hdf5`` with one group per episode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.data.causes import first_line
from flowpolicy.data.importers.hdf5 import child, feature_of, group_source, open_hdf5
from flowpolicy.data.importers.registry import Contents, importer
from flowpolicy.data.importers.source import Bounds, Feature, Source, json_object, natural_order
from flowpolicy.errors import DataError
from flowpolicy.optional import optional

_MAIN_FILE = "main_data.hdf5"
_KEYS = {
    "actions": "action",
    "observations": "observation",
    "rewards": "reward",
    "terminations": "terminated",
    "truncations": "truncated",
}


def _is_minari(contents: Contents) -> bool:
    is_folder = contents.has(f"data/{_MAIN_FILE}") or contents.has(_MAIN_FILE)
    return is_folder or any(name.startswith("episode_") for name in contents.hdf5)


@importer("minari", _is_minari)
def open_minari(path: Path, download: bool = False) -> Iterator[Source]:
    """A Minari dataset: its folder, its HDF5 file, or the id of one that the minari package knows.

    Minari keeps one observation more than actions; the last is left out. A dictionary of observations becomes
    one key each (``desired_goal``, nested ones ``outer.inner``), a plain one becomes ``observation``. Where
    the action is a dictionary, ``action=[actions/arm, actions/gripper]`` says what makes it. The bounds of
    each action dimension are those of the dataset's action space.

    Args:
        path: folder, file, or dataset id such as ``D4RL/door/human-v2``.
        download: let the minari package fetch an id that is not on this machine.

    Raises:
        DataError: a damaged, incomplete or unknown dataset.
    """
    file_path = _find_file(path, download)
    beside = file_path.parent / "metadata.json"
    metadata = json_object(beside) if beside.is_file() else {}
    with open_hdf5(file_path) as file:
        names = natural_order([name for name in file if name.startswith("episode_")])
        expected = metadata.get("total_episodes")
        if isinstance(expected, int) and expected != len(names):
            raise DataError(
                f"{file_path} holds {len(names)} episodes and its metadata {expected}; copy it again."
            )
        yield group_source(
            file_path,
            {name: child(file, name, file_path) for name in names},
            _feature,
            attributes=_attributes(metadata, file_path),
            bounds=_bounds(_parsed(metadata.get("action_space"))),
            longer=lambda name: name.partition("/")[0] in ("observations", "infos"),
        )


def _feature(name: str, node: Any) -> Feature:
    head, _, rest = name.partition("/")
    key = _KEYS.get(name) or (rest if head == "observations" else name).replace("/", ".")
    return feature_of(name, key, node, default=name in _KEYS or head == "observations")


def _attributes(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    attributes = {"imported_from": metadata.get("dataset_id", path.name)}
    for name, given in (("author", "author"), ("licence", "license"), ("code", "code_permalink")):
        if metadata.get(given):
            attributes[name] = metadata[given]
    env_spec = _parsed(metadata.get("env_spec"))
    if env_spec.get("id"):
        attributes["env_id"] = env_spec["id"]
    return attributes


def _find_file(path: Path, download: bool) -> Path:
    for candidate in (path, path / "data" / _MAIN_FILE, path / _MAIN_FILE):
        if candidate.is_file():
            return candidate
    if path.exists():
        raise DataError(f"{path} has no data/{_MAIN_FILE}; give a Minari dataset kept as HDF5.")
    if path.is_absolute() or path.suffix:
        raise DataError(f"There is no Minari dataset at {path}; check the path.")
    with optional(f"'{path}' is no folder here, and reading it as an id needs minari", "minari", DataError):
        import minari
    try:
        stored = Path(minari.load_dataset(str(path), download=download).storage.data_path)
    except Exception as error:
        raise DataError(
            f"Minari has no dataset '{path}' on this machine ({first_line(error)}); "
            "check the id, or let it be fetched with options.download=true."
        ) from error
    if not (stored / _MAIN_FILE).is_file():
        raise DataError(f"Minari keeps '{path}' without {_MAIN_FILE}; only its HDF5 storage can be read.")
    return stored / _MAIN_FILE


def _parsed(text: Any) -> dict[str, Any]:
    try:
        content = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _bounds(space: dict[str, Any]) -> Bounds | None:
    """Of a Box, dimension by dimension; None where no dimension has any, or none make sense."""
    try:
        low, high = (np.asarray(space[name], np.float64).reshape(-1) for name in ("low", "high"))
    except (KeyError, TypeError, ValueError):
        return None
    low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
    if low.size == 0 or low.shape != high.shape or (low > high).any():
        return None
    return Bounds(low, high) if np.isfinite([low, high]).any() else None

"""Minari's own layout on disk: ``data/main_data.hdf5`` with one group per episode."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.episodes import join_episodes, natural_order
from flowpolicy.data.importers.hdf5 import child, dataset, is_group, open_hdf5
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import first_line, resolve_path
from flowpolicy.errors import DataError
from flowpolicy.progress import progress

logger = logging.getLogger(__name__)
MAIN_FILE = "main_data.hdf5"


def read_minari(path: Path | str, download: bool = False) -> Demonstrations:
    """Read a Minari dataset: its folder, its HDF5 file, or the id of one that the minari package knows.

    Minari keeps one observation more than actions; the last is left out. A dictionary of observations becomes
    one key each (``desired_goal``, nested ones ``outer.inner``), a plain one becomes ``observation``.

    Args:
        path: folder, file, or dataset id such as ``D4RL/door/human-v2``.
        download: let the minari package fetch an id that is not on this machine.

    Raises:
        DataError: a damaged, incomplete or unknown dataset.
    """
    file_path = _find_file(path, download)
    metadata = _metadata(file_path.parent / "metadata.json")
    where = str(file_path)
    with open_hdf5(file_path) as file:
        names = natural_order([name for name in file if name.startswith("episode_")])
        episodes = [
            _episode(child(file, name, file_path), file_path) for name in progress(names, "read episodes")
        ]
    expected = metadata.get("total_episodes")
    if isinstance(expected, int) and expected != len(episodes):
        raise DataError(f"{where} holds {len(episodes)} episodes and its metadata {expected}; copy it again.")
    attributes = {"imported_from": metadata.get("dataset_id", file_path.name)}
    for name, given in (("author", "author"), ("licence", "license"), ("code", "code_permalink")):
        if metadata.get(given):
            attributes[name] = metadata[given]
    env_spec = _parsed(metadata.get("env_spec"))
    if env_spec.get("id"):
        attributes["env_id"] = env_spec["id"]
    bounds = _bounds(_parsed(metadata.get("action_space")))
    if bounds is not None:
        attributes["action_bounds"] = bounds
    return join_episodes(episodes, names, where, attributes)


def _find_file(path: Path | str, download: bool) -> Path:
    folder = resolve_path(path)
    for candidate in (folder, folder / "data" / MAIN_FILE, folder / MAIN_FILE):
        if candidate.is_file():
            return candidate
    if folder.exists():
        raise DataError(f"{folder} has no data/{MAIN_FILE}; give a Minari dataset kept as HDF5.")
    if Path(path).is_absolute() or Path(path).suffix:
        raise DataError(f"There is no Minari dataset at {path}; check the path.")
    try:
        import minari
    except ImportError as error:
        raise DataError(
            f"'{path}' is no folder here, and reading it as an id needs: pip install 'flowpolicy[minari]'."
        ) from error
    try:
        stored = Path(minari.load_dataset(str(path), download=download).storage.data_path)
    except Exception as error:
        raise DataError(
            f"Minari has no dataset '{path}' on this machine ({first_line(error)}); "
            "check the id, or let it be fetched with options.download=true."
        ) from error
    if not (stored / MAIN_FILE).is_file():
        raise DataError(f"Minari keeps '{path}' without {MAIN_FILE}; only its HDF5 storage can be read.")
    return stored / MAIN_FILE


def _episode(group: Any, path: Path) -> dict[str, NDArray[Any]]:
    actions = child(group, "actions", path)
    if is_group(actions):
        raise DataError(
            f"{path}: '{group.name}/actions' is a dictionary or tuple; only Box actions can be learned."
        )
    action = dataset(group, "actions", path)
    episode = {"action": action}
    observations = _leaves(child(group, "observations", path), "", path)
    if not observations:
        raise DataError(f"{path}: '{group.name}/observations' holds no numbers; at least one key is needed.")
    for key, array in observations.items():
        if array.ndim == 0 or action.ndim == 0 or len(array) != len(action) + 1:
            raise DataError(
                f"{path}: '{group.name}/observations' has shape {array.shape} for actions {action.shape}; "
                "Minari keeps one observation more than actions."
            )
        episode[key or "observation"] = array[:-1]
    names = {"rewards": "reward", "terminations": "terminated", "truncations": "truncated"}
    return episode | {key: dataset(group, name, path) for name, key in names.items() if name in group}


def _leaves(node: Any, key: str, path: Path) -> dict[str, NDArray[Any]]:
    if is_group(node):
        found: dict[str, NDArray[Any]] = {}
        for name in node:
            found |= _leaves(child(node, name, path), f"{key}.{name}" if key else name, path)
        return found
    if node.dtype.kind not in "fiub":
        logger.warning("%s: '%s' is text or encoded images and is left out.", path, node.name)
        return {}
    return {key: dataset(node.parent, node.name.rpartition("/")[2], path)}


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({first_line(error)}); copy the dataset again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object; copy the dataset again.")
    return content


def _parsed(text: Any) -> dict[str, Any]:
    try:
        content = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _bounds(space: dict[str, Any]) -> list[float] | None:
    """The widest bounds of a Box, or None where it has none."""
    try:
        low, high = np.asarray(space["low"], np.float64), np.asarray(space["high"], np.float64)
    except (KeyError, TypeError, ValueError):
        return None
    if low.size == 0 or not (np.isfinite(low).all() and np.isfinite(high).all()):
        return None
    return [float(low.min()), float(high.max())]

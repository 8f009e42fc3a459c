"""robomimic's HDF5 (``data/demo_i/{obs/*,actions,...}``), and robosuite's, with simulator states alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flowpolicy.data.importers.episodes import join_episodes, natural_order
from flowpolicy.data.importers.hdf5 import child, dataset, is_group, json_attribute, open_hdf5
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError
from flowpolicy.progress import progress

_FIELDS = {"rewards": "reward", "dones": "done"}


def read_robomimic(path: Path | str, filter_key: str | None = None) -> Demonstrations:
    """Read a robomimic or robosuite file, demonstrations in numeric order (``demo_10`` after ``demo_2``).

    Each ``obs/<key>`` becomes the key of that name. ``states`` (simulator states) stays ``states``; where the
    file has no ``obs`` at all, as robosuite's own recordings, it becomes ``observation``. ``dones`` becomes
    ``done``, since robomimic also sets it at the end of a recording that did not terminate.

    The subsets listed under ``mask/`` are kept in the attribute ``masks``, as numbers of episodes.

    Args:
        path: the HDF5 file.
        filter_key: read only a subset listed under ``mask/``, such as ``train``.

    Raises:
        DataError: a damaged file, a missing key or subset, or demonstrations that differ in shape.
    """
    path = resolve_path(path)
    with open_hdf5(path) as file:
        data = child(file, "data", path)
        if not is_group(data):
            raise DataError(f"{path}: 'data' is an array where a group of demonstrations is expected.")
        names = natural_order(_chosen(file, data, filter_key, path))
        episodes = [
            _episode(child(data, name, path), path) for name in progress(names, "read demonstrations")
        ]
        attributes: dict[str, Any] = {"imported_from": path.name}
        for name in ("env_args", "env_info"):
            content = json_attribute(data, name, path)
            if content is not None:
                attributes[name] = content
        if filter_key is None and "mask" in file:
            attributes["masks"] = _masks(child(file, "mask", path), names, path)
        env = attributes.get("env_args", attributes.get("env_info"))
        if isinstance(env, dict) and "env_name" in env:
            attributes["env_id"] = env["env_name"]
        for name in ("repository_version", "date"):
            if isinstance(data.attrs.get(name), str):
                attributes[f"source_{name}"] = data.attrs[name]
    return join_episodes(episodes, names, str(path), attributes)


def _chosen(file: Any, data: Any, filter_key: str | None, path: Path) -> list[str]:
    if filter_key is None:
        return [name for name in data if name.startswith("demo")]
    return _listed_names(child(file, "mask", path), filter_key, path)


def _listed_names(masks: Any, mask: str, path: Path) -> list[str]:
    node = child(masks, mask, path)
    if is_group(node) or node.ndim != 1 or node.dtype.kind not in "SO":
        raise DataError(f"{path}: 'mask/{mask}' must be a list of demonstration names.")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in node[()]]


def _masks(masks: Any, names: list[str], path: Path) -> dict[str, list[int]]:
    """Every mask as numbers of episodes, in the order in which they are read."""
    numbers = {name: number for number, name in enumerate(names)}
    found = {}
    for mask in masks:
        listed = _listed_names(masks, mask, path)
        unknown = [name for name in listed if name not in numbers]
        if unknown:
            raise DataError(f"{path}: 'mask/{mask}' names '{unknown[0]}', which is not there; mend the mask.")
        found[str(mask)] = sorted(numbers[name] for name in listed)
    return found


def _episode(group: Any, path: Path) -> dict[str, NDArray[Any]]:
    if not is_group(group):
        raise DataError(f"{path}: '{group.name}' is an array where a demonstration is expected.")
    episode = {"action": dataset(group, "actions", path)}
    if "obs" in group:
        observations = child(group, "obs", path)
        if not is_group(observations):
            raise DataError(
                f"{path}: '{observations.name}' is an array where a group of observations is expected."
            )
        episode |= {key: dataset(observations, key, path) for key in observations}
        if "states" in group:
            episode["states"] = dataset(group, "states", path)
    else:
        episode["observation"] = dataset(group, "states", path)
    return episode | {key: dataset(group, name, path) for name, key in _FIELDS.items() if name in group}

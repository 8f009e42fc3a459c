"""robomimic's HDF5 (``data/demo_i/{obs/*,actions,...}``), robosuite's with simulator states alone, and
Isaac Lab's recorder, whose groups are nested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.hdf5 import (
    child,
    feature_of,
    group_source,
    is_group,
    json_attribute,
    open_hdf5,
)
from flowpolicy.data.importers.registry import importer
from flowpolicy.data.importers.source import Feature, Source, natural_order
from flowpolicy.data.keys import SOURCE, TASK_INDEX, TASKS, TICK
from flowpolicy.errors import DataError

_KEYS = {
    "actions": "action",
    "rewards": "reward",
    "dones": "done",
    "obs": "observation",
    TASK_INDEX: TASK_INDEX,
    SOURCE: SOURCE,
    TICK: TICK,
}
_ROBOSUITE_TYPE = 1  # robomimic's number for robosuite's environments


@importer("robomimic", lambda contents: "data" in contents.hdf5)
def open_robomimic(path: Path, filter_key: str | None = None) -> Iterator[Source]:
    """A robomimic, robosuite or Isaac Lab file, in numeric order (``demo_10`` after ``demo_2``).

    Each ``obs/<key>`` becomes the key of that name, ``obs/<group>/<key>`` becomes ``<group>.<key>``.
    ``states`` (simulator states) stays ``states``; where the file has no ``obs`` at all, as robosuite's own
    recordings, it becomes ``observation``. ``dones`` becomes ``done``, since robomimic also sets it at the
    end of a recording that did not terminate. Everything else (``actions_abs``, ``next_obs/*``, nested
    ``states/*``) is read where it is named.

    The subsets listed under ``mask/`` are kept in the attribute ``masks``, as numbers of episodes.

    Args:
        path: the HDF5 file.
        filter_key: read only a subset listed under ``mask/``, such as ``train``.

    Raises:
        DataError: a damaged file, a missing subset, or something else where demonstrations are expected.
    """
    with open_hdf5(path) as file:
        data = child(file, "data", path)
        if not is_group(data):
            raise DataError(f"{path}: 'data' is an array where a group of demonstrations is expected.")
        names = natural_order(_chosen(file, data, filter_key, path))
        groups = {name: child(data, name, path) for name in names}
        has_observations = any(is_group(group) and "obs" in group for group in groups.values())

        yield group_source(
            path,
            groups,
            lambda name, node: _feature(name, node, has_observations),
            attributes=_attributes(file, data, names if filter_key is None else None, path),
        )


def _feature(name: str, node: Any, has_observations: bool) -> Feature:
    keys = _KEYS if has_observations else {**_KEYS, "states": "observation"}
    head, _, rest = name.partition("/")
    key = keys.get(name) or (name if head == "states" else rest or name).replace("/", ".")
    is_observed = head == "obs" or name == "states" or (head == "states" and not has_observations)
    return feature_of(name, key, node, default=name in keys or is_observed)


def _attributes(file: Any, data: Any, names: list[str] | None, path: Path) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name in ("env_args", "env_info"):
        content = json_attribute(data, name, path)
        if content is not None:
            attributes[name] = content
    if TASKS in file:  # of a store that was exported
        attributes[TASKS] = _listed_names(file, TASKS, path)
    if names is not None and "mask" in file:
        attributes["masks"] = _masks(child(file, "mask", path), names, path)
    env = attributes.get("env_args", attributes.get("env_info"))
    if isinstance(env, dict) and "env_name" in env:
        attributes["env_id"] = env["env_name"]
    for name in ("repository_version", "date"):
        if isinstance(data.attrs.get(name), str):
            attributes[f"source_{name}"] = data.attrs[name]
    version = attributes.get("source_repository_version")
    described = attributes.get("env_args")
    if isinstance(described, dict):
        version = described.get("env_version") if described.get("type") == _ROBOSUITE_TYPE else None
    if isinstance(version, str) and version:
        attributes["env_version"] = version
    return attributes


def _chosen(file: Any, data: Any, filter_key: str | None, path: Path) -> list[str]:
    if filter_key is None:
        return [name for name in data if name.startswith("demo")]
    return _listed_names(child(file, "mask", path), filter_key, path)


def _listed_names(group: Any, name: str, path: Path) -> list[str]:
    """The texts of an array, as those of ``mask/<name>``."""
    node = child(group, name, path)
    if is_group(node) or node.ndim != 1 or node.dtype.kind not in "SO":
        raise DataError(f"{path}: '{node.name.strip('/')}' must be a list of names.")
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in node[()]]


def _masks(masks: Any, names: list[str], path: Path) -> dict[str, list[int]]:
    """Every mask as numbers of episodes, in the order in which they are read."""
    numbers = {name: number for number, name in enumerate(names)}
    found = {}
    for mask in masks:
        listed = _listed_names(masks, mask, path)
        unknown = [name for name in listed if name not in numbers]
        if unknown:
            raise DataError(f"{path}: 'mask/{mask}' names '{unknown[0]}', which is not there; fix the mask.")
        found[str(mask)] = sorted(numbers[name] for name in listed)
    return found

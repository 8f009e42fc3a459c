"""ManiSkill's trajectories: HDF5 with one group ``traj_i`` per episode, and a JSON file of the same name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.episodes import natural_order
from flowpolicy.data.importers.hdf5 import (
    Hdf5Episodes,
    child,
    feature_of,
    is_group,
    list_features,
    open_hdf5,
)
from flowpolicy.data.importers.source import Feature, Source, json_object
from flowpolicy.data.zarr_reading import resolve_path

_KEYS = {
    "actions": "action",
    "rewards": "reward",
    "terminated": "terminated",
    "truncated": "truncated",
    "obs": "observation",
}
_LONGER = ("obs", "env_states", "env_init_state")


@contextlib.contextmanager
def open_maniskill(path: Path | str) -> Iterator[Source]:
    """A ManiSkill file: ``traj_i/{obs, actions, terminated, truncated, rewards, success, env_states}``.

    ``obs`` as one array becomes ``observation``; nested, ``obs/agent/qpos`` becomes ``agent.qpos``.
    It has one row more than there are actions, which is left out. ``env_states`` is taken by itself only
    where the file holds no ``obs`` (ManiSkill's own demonstrations, before they are replayed). The JSON file
    beside it says which environment it is.

    Args:
        path: the ``.h5`` file.

    Raises:
        DataError: a damaged file.
    """
    path = resolve_path(path)
    with open_hdf5(path) as file:
        names = natural_order([name for name in file if name.startswith("traj_")])
        groups = [child(file, name, path) for name in names]
        has_observations = any(is_group(group) and _holds_arrays(group.get("obs")) for group in groups)

        def describe(name: str, node: Any) -> Feature:
            head, _, rest = name.partition("/")
            default = name in _KEYS or head == "obs" or (head == "env_states" and not has_observations)
            key = _KEYS.get(name) or (rest if head == "obs" else name).replace("/", ".")
            return feature_of(name, key, node, default=default)

        yield Hdf5Episodes(
            str(path),
            list_features(groups, path, describe),
            names,
            _attributes(path),
            group=lambda number: groups[number],
            path=lambda number: path,
            longer=lambda name: name.partition("/")[0] in _LONGER,
        )


def _holds_arrays(node: Any) -> bool:
    return node is not None and (not is_group(node) or len(node) > 0)


def _attributes(path: Path) -> dict[str, Any]:
    attributes: dict[str, Any] = {"imported_from": path.name}
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return attributes
    description = json_object(beside, "trajectories")
    env = description.get("env_info")
    if isinstance(env, dict):
        attributes["env_info"] = env
        if isinstance(env.get("env_id"), str):
            attributes["env_id"] = env["env_id"]
    return attributes

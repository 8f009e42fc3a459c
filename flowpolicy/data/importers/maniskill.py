"""ManiSkill's trajectories: HDF5 with one group ``traj_i`` per episode, and a JSON file of the same name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.hdf5 import child, feature_of, group_source, is_group, open_hdf5
from flowpolicy.data.importers.registry import importer
from flowpolicy.data.importers.source import Feature, Source, json_object, natural_order

_KEYS = {
    "actions": "action",
    "rewards": "reward",
    "terminated": "terminated",
    "truncated": "truncated",
    "obs": "observation",
}


@importer("maniskill", lambda contents: any(name.startswith("traj_") for name in contents.hdf5))
def open_maniskill(path: Path) -> Iterator[Source]:
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
    with open_hdf5(path) as file:
        names = natural_order([name for name in file if name.startswith("traj_")])
        groups = {name: child(file, name, path) for name in names}
        has_observations = any(
            is_group(group) and _holds_arrays(group.get("obs")) for group in groups.values()
        )

        def feature(name: str, node: Any) -> Feature:
            head, _, rest = name.partition("/")
            default = name in _KEYS or head == "obs" or (head == "env_states" and not has_observations)
            key = _KEYS.get(name) or (rest if head == "obs" else name).replace("/", ".")
            return feature_of(name, key, node, default=default)

        yield group_source(
            path,
            groups,
            feature,
            attributes=_attributes(path.with_suffix(".json")),
            longer=lambda name: name.partition("/")[0] in ("obs", "env_states", "env_init_state"),
        )


def _holds_arrays(node: Any) -> bool:
    return node is not None and (not is_group(node) or len(node) > 0)


def _attributes(beside: Path) -> dict[str, Any]:
    env = json_object(beside, "trajectories").get("env_info") if beside.is_file() else None
    if not isinstance(env, dict):
        return {}
    return {"env_info": env} | ({"env_id": env["env_id"]} if isinstance(env.get("env_id"), str) else {})

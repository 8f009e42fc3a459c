"""The pickled human demonstrations of the Adroit hand (Rajeswaran et al. 2018)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.episodes import join_episodes
from flowpolicy.data.importers.restricted_pickle import load_arrays
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError

logger = logging.getLogger(__name__)
_KEYS = {"observations": "observation", "actions": "action", "rewards": "reward"}


def read_adroit(path: Path | str, clip: bool = True) -> Demonstrations:
    """Read a pickled list of episodes, dicts with ``observations``, ``actions`` and, if any, ``rewards``.

    The file is read without running anything it contains. The hand's actuators take actions in [-1, 1], and
    so does the environment; recorded actions outside are clipped, and their number is logged and kept in the
    attribute ``actions_clipped``.

    Args:
        path: the pickle.
        clip: bring actions into [-1, 1].

    Raises:
        DataError: a damaged or hostile file, or one of another structure.
    """
    path = resolve_path(path)
    content = load_arrays(path)
    where = str(path)
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{where} holds a {type(content).__name__} where a list of episodes is expected.")
    names = [f"episode {i}" for i in range(len(content))]
    episodes = [_episode(item, name, where) for item, name in zip(content, names, strict=True)]
    attributes: dict[str, Any] = {"imported_from": path.name}
    if clip and episodes:
        actions = np.concatenate([episode["action"].ravel() for episode in episodes])
        outside = int((np.abs(actions) > 1).sum())
        if outside:
            logger.info(
                "%s: %d of %d action entries (%.1f%%) lie outside [-1, 1] and are clipped.",
                where, outside, actions.size, 100 * outside / actions.size,
            )  # fmt: skip
            episodes = [{**episode, "action": _clipped(episode["action"])} for episode in episodes]
        attributes["actions_clipped"] = outside
        attributes["action_bounds"] = [-1.0, 1.0]
    return join_episodes(episodes, names, where, attributes)


def _clipped(action: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isfinite(action), np.clip(action, -1.0, 1.0), action)  # inf stays, to be refused


def _episode(item: Any, name: str, where: str) -> dict[str, NDArray[Any]]:
    if not isinstance(item, dict):
        raise DataError(
            f"{where}: {name} is a {type(item).__name__} where a dictionary of arrays is expected."
        )
    for key in ("observations", "actions"):
        if key not in item:
            raise DataError(f"{where}: {name} has no key '{key}'; an episode has observations and actions.")
    episode = {}
    for key, ours in _KEYS.items():
        if key in item:
            if not isinstance(item[key], np.ndarray):
                raise DataError(
                    f"{where}: '{key}' of {name} is a {type(item[key]).__name__}, not a numpy array."
                )
            episode[ours] = item[key]
    return episode

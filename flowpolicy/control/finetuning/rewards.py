"""What recorded episodes of a robot were worth.

A function of one's own, ``module:function``, takes an episode, key -> ``(n, ...)`` with the observations, the
``action`` and whatever else was recorded, and gives the n rewards, each of what followed the action of its
row. The learner calls it when the episode is over: no tick waits for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.recorder import FAILED, SUCCEEDED
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import ConfigError, DataError

ROBOT, SUCCESS = "robot", "success"
RewardFunction = Callable[[dict[str, NDArray[Any]]], Any]


def reward_function(choice: str) -> RewardFunction | None:
    """The function that ``module:function`` names; None of the other choices.

    Raises:
        ConfigError: there is no such choice, or no such function.
    """
    if choice in (ROBOT, SUCCESS):
        return None
    module, _, name = choice.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: RewardFunction = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"reward={choice} cannot be imported ({error}); say robot, success, or module:function of an "
            "installed module or a file of the present folder."
        ) from error
    return found


def rewarded(episodes: Demonstrations, choice: str) -> Demonstrations:
    """Episodes with rewards, and with the ends at which nothing more can be gained.

    The robot's own rewards come with its own ends. With others an episode that was judged ends there too: a
    success, and a failure where the robot tells of no ends.

    Args:
        episodes: as a control loop recorded them.
        choice: see :class:`~flowpolicy.control.finetuning.config.RobotFinetuningConfig`.

    Raises:
        ConfigError: the robot tells of no rewards.
        DataError: a function gives something else than a finite number for each row.
    """
    function, arrays, ends = reward_function(choice), dict(episodes.arrays), episodes.episode_ends
    if choice == ROBOT:
        if "reward" not in arrays:
            raise ConfigError(
                "The robot tells of no rewards; say reward=success, or reward=module:function with a "
                "function of an episode."
            )
        return episodes
    tells = "terminated" in arrays
    terminated = arrays["terminated"].copy() if tells else np.zeros(episodes.num_steps, bool)
    succeeded, failed = (np.array(episodes.masks.get(mark, []), int) for mark in (SUCCEEDED, FAILED))
    terminated[ends[succeeded] - 1] = True
    if not tells:
        terminated[ends[failed] - 1] = True
    rewards = np.zeros(episodes.num_steps, np.float32)
    if function is None:
        rewards[ends[succeeded] - 1] = 1.0
    else:
        for first, end in zip(episodes.episode_starts, ends, strict=True):
            episode = {key: rows[first:end] for key, rows in arrays.items()}
            rewards[first:end] = _given(function, episode, choice)
    return replace(episodes, arrays={**arrays, "reward": rewards, "terminated": terminated})


def _given(function: RewardFunction, episode: dict[str, NDArray[Any]], choice: str) -> NDArray[np.float32]:
    rows = len(episode["action"])
    found = np.asarray(function(episode), dtype=np.float32)
    if found.shape != (rows,) or not np.isfinite(found).all():
        raise DataError(
            f"reward={choice} gave {'NaN or infinity' if found.shape == (rows,) else f'shape {found.shape}'} "
            f"for an episode of {rows} rows; it must give a finite number for each."
        )
    return found

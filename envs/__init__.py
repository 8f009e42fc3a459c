"""Everything that knows a simulator: tasks, wrappers and experts. The library never imports it.

Importing this package registers the wrapped tasks with Gymnasium; a simulator itself is imported only when
one of its environments is made.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def _adroit(wrapped: str) -> dict[str, Any]:
    return {
        "entry_point": "flowpolicy_envs.adroit:make_adroit",
        "max_episode_steps": 200,  # gymnasium-robotics' own; a task's config may ask for more
        "kwargs": {"wrapped_id": wrapped},
    }


ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "flowpolicy/PushT-v0": {"entry_point": "flowpolicy_envs.pusht:make_push_t", "max_episode_steps": 300},
    "flowpolicy/PushTImages-v0": {
        "entry_point": "flowpolicy_envs.pusht:make_push_t_images",
        "max_episode_steps": 300,
    },
    "flowpolicy/AdroitDoor-v1": _adroit("AdroitHandDoor-v1"),
    "flowpolicy/AdroitPen-v1": _adroit("AdroitHandPen-v1"),
    "flowpolicy/AdroitHammer-v1": _adroit("AdroitHandHammer-v1"),
    "flowpolicy/AdroitRelocate-v1": _adroit("AdroitHandRelocate-v1"),
    "flowpolicy/Robosuite-v0": {
        "entry_point": "flowpolicy_envs.robosuite_env:RobosuiteTask",
        "max_episode_steps": 400,  # as robomimic evaluates; a task's config may ask for fewer
    },
    "flowpolicy/MetaWorld-v0": {
        "entry_point": "flowpolicy_envs.metaworld:MetaWorld",
        "max_episode_steps": 250,
    },
    "flowpolicy/FetchPickAndPlace-v0": {
        "entry_point": "flowpolicy_envs.fetch:make_fetch",
        "max_episode_steps": 50,  # gymnasium-robotics' own
        "kwargs": {"wrapped_id": "FetchPickAndPlace-v4"},
    },
    "flowpolicy/FrankaKitchen-v0": {
        "entry_point": "flowpolicy_envs.kitchen:make_kitchen",
        "max_episode_steps": 280,
    },
}
"""Gymnasium id -> what it is registered with."""


def register_environments() -> None:
    """Register the wrapped tasks; a second call changes nothing."""
    from gymnasium.envs.registration import register, registry

    for name, settings in ENVIRONMENTS.items():
        if name not in registry:
            register(name, **settings)


if find_spec("gymnasium") is not None:
    register_environments()

"""Everything that knows a simulator: tasks, wrappers and demonstrators. The library never imports it.

Importing this package registers the wrapped tasks with Gymnasium; a simulator itself is imported only when
one of its environments is made.
"""

from __future__ import annotations

from importlib.util import find_spec

PUSH_T = {
    "flowpolicy/PushT-v0": "make_push_t",
    "flowpolicy/PushTImages-v0": "make_push_t_images",
}
ROBOSUITE = "flowpolicy/Robosuite-v0"
ADROIT = {
    "flowpolicy/AdroitDoor-v1": "AdroitHandDoor-v1",
    "flowpolicy/AdroitPen-v1": "AdroitHandPen-v1",
    "flowpolicy/AdroitHammer-v1": "AdroitHandHammer-v1",
    "flowpolicy/AdroitRelocate-v1": "AdroitHandRelocate-v1",
}
META_WORLD = "flowpolicy/MetaWorld-v0"
FETCH = {"flowpolicy/FetchPickAndPlace-v0": "FetchPickAndPlace-v4"}
KITCHEN = "flowpolicy/FrankaKitchen-v0"


def register_environments() -> None:
    """Register the wrapped tasks; a second call changes nothing."""
    from gymnasium.envs.registration import register, registry

    for name, maker in PUSH_T.items():
        if name not in registry:
            register(name, entry_point=f"flowpolicy_envs.pusht:{maker}", max_episode_steps=300)
    if ROBOSUITE not in registry:
        register(
            ROBOSUITE,
            entry_point="flowpolicy_envs.robosuite_env:RobosuiteTask",
            max_episode_steps=400,  # as robomimic evaluates; a task's config may ask for fewer
        )
    for name, wrapped in ADROIT.items():
        if name not in registry:
            register(
                name,
                entry_point="flowpolicy_envs.adroit:make_adroit",
                max_episode_steps=200,  # gymnasium-robotics' own; a task's config may ask for more
                kwargs={"wrapped_id": wrapped},
            )
    if META_WORLD not in registry:
        register(META_WORLD, entry_point="flowpolicy_envs.metaworld:MetaWorld", max_episode_steps=250)
    for name, wrapped in FETCH.items():
        if name not in registry:
            register(
                name,
                entry_point="flowpolicy_envs.fetch:make_fetch",
                max_episode_steps=50,  # gymnasium-robotics' own
                kwargs={"wrapped_id": wrapped},
            )
    if KITCHEN not in registry:
        register(KITCHEN, entry_point="flowpolicy_envs.kitchen:make_kitchen", max_episode_steps=280)


if find_spec("gymnasium") is not None:
    register_environments()

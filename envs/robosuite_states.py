"""Recordings that hold simulator states alone, as robosuite's own, turned into what its tasks observe.

Each function is a ``demo_transform`` for ``scripts/import_demos.py``: it puts a Panda's simulator into every
recorded state, one after the other, and reads the observations there. The recorded model is not loaded:
robosuite 1.5 gave the parts of its robots other names, so files of 1.4 do not fit; their joints do, in number
and order. The states therefore come out as recorded, while sizes that were drawn for the recorded model (the
cube's, within a millimetre) are the present model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from flowpolicy.errors import DataError
from flowpolicy.runs.progress import progress

_STATE_KEYS = ("states", "observation")  # with observations beside them, and without


def observe_states(env_name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every observation of a robosuite task at recorded states ``(steps, n)``, the states, and the actions.

    ``reward`` is 1 where the task is done, 0 elsewhere.

    Raises:
        DataError: there are no states.
        TaskError: they are another model's.
    """
    from flowpolicy_envs.robosuite_env import RobosuiteTask

    key = next((name for name in _STATE_KEYS if name in arrays), None)
    if key is None:
        raise DataError(
            f"Simulator states are needed and there are {', '.join(sorted(arrays))}; use the raw file."
        )
    env = RobosuiteTask({"env_name": env_name, "env_kwargs": {"robots": "Panda"}})
    rows: list[dict[str, Any]] = []
    try:
        env.reset(seed=0)
        for state in progress(arrays[key], "observe states"):
            env.set_states(state)
            rows.append({**env.observe(), "reward": np.float32(env.is_success())})
    finally:
        env.close()
    made = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**made, "action": arrays["action"], "states": arrays[key]}


observe_lift = partial(observe_states, "Lift")
observe_can = partial(observe_states, "PickPlaceCan")
observe_square = partial(observe_states, "NutAssemblySquare")

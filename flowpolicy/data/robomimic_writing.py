"""Demonstrations as a robomimic HDF5 file, which robomimic's own loaders and scripts read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.keys import PER_STEP_KEYS, SOURCE, TASK_INDEX, TASKS, TICK
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.store_writing import check_new
from flowpolicy.errors import DataError
from flowpolicy.files.storage import atomic_file
from flowpolicy.optional import optional
from flowpolicy.runs.progress import progress
from flowpolicy.settings import require

_NOT_OBSERVED = {"action", "states", *PER_STEP_KEYS}
_GYM_TYPE = 2  # robomimic's number for Gym environments; robosuite's is 1
_COMPRESSED_DIMENSIONS = 3  # rows of images; vectors are stored as they are


def write_robomimic(
    path: Path | str,
    demos: Demonstrations,
    *,
    env_args: Mapping[str, Any] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write ``data/demo_i/{obs/*, actions, rewards, dones, states}``, ``mask/train`` and ``mask/valid``.

    ``rewards`` are zero where the demonstrations have none. ``dones`` are 1 at a terminal state and at the
    end of an episode. Every other key becomes an observation; ``next_obs`` is left out, since the observation
    after the last action was not recorded (``load_next_obs=False`` in robomimic). Tasks in words stand in
    ``tasks`` and ``demo_i/task_index``, which robomimic does not read.

    Args:
        path: the new file.
        demos: what to write.
        env_args: how robomimic makes the environment: ``env_name``, ``type``, ``env_kwargs``; None takes
            those in the demonstrations' attributes.
        validation_fraction: share of the episodes in ``mask/valid``, drawn by the seed; the demonstrations'
            own masks, where they have any, are written in place of these two.
        seed: of that draw.

    Raises:
        DataError: h5py is missing, ``path`` exists, or there is nothing to observe.
    """
    with optional(f"{path} needs h5py to be written", "import", DataError):
        import h5py
    require(0 <= validation_fraction < 1, "validation_fraction", validation_fraction, "in [0, 1)")
    path = check_new(path)
    observed = [key for key in demos.arrays if key not in _NOT_OBSERVED]
    if not observed:
        raise DataError(f"{demos.source} has no observations; robomimic's files need at least one key.")
    masks = _masks(demos, validation_fraction, seed)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = demos.num_steps
        data.attrs["env_args"] = json.dumps(_env_args(demos, env_args))
        for number in progress(range(demos.num_episodes), "write demonstrations"):
            rows = slice(int(demos.episode_starts[number]), int(demos.episode_ends[number]))
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = rows.stop - rows.start
            for name, array in _episode(demos, rows, observed).items():
                compressed = "gzip" if array.ndim > _COMPRESSED_DIMENSIONS else None
                group.create_dataset(name, data=array, compression=compressed)
        if demos.attributes.get(TASKS):
            file[TASKS] = np.array([str(task).encode() for task in demos.attributes[TASKS]], dtype="S")
        for name, episodes in masks.items():
            file[f"mask/{name}"] = np.array([f"demo_{number}".encode() for number in episodes], dtype="S")
    return path


def _episode(demos: Demonstrations, rows: slice, observed: list[str]) -> dict[str, NDArray[Any]]:
    arrays = {key: array[rows] for key, array in demos.arrays.items()}
    steps = rows.stop - rows.start
    ended = np.arange(steps) == steps - 1
    for key in ("terminated", "truncated", "done"):
        if key in arrays:
            ended = ended | (arrays[key].reshape(steps) != 0)
    written = {
        "actions": arrays["action"],
        "rewards": arrays.get("reward", np.zeros(steps, np.float32)).reshape(steps),
        "dones": ended.astype(np.int64),
    }
    written |= {key: arrays[key] for key in ("states", TASK_INDEX, SOURCE, TICK) if key in arrays}
    return written | {f"obs/{key}": arrays[key] for key in observed}


def _env_args(demos: Demonstrations, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """robomimic's description of the environment: as given, as imported, or of our own Gymnasium one."""
    env_kwargs = demos.attributes.get("env_kwargs") or {}
    own = {
        "env_name": demos.attributes.get("env_id", "unknown"),
        "type": _GYM_TYPE,
        "env_kwargs": env_kwargs,
    }
    return dict(given or demos.attributes.get("env_args") or env_kwargs.get("env_args") or own)


def _masks(demos: Demonstrations, fraction: float, seed: int) -> dict[str, list[int]]:
    if demos.masks:
        return {name: list(episodes) for name, episodes in demos.masks.items()}
    order = np.random.default_rng(seed).permutation(demos.num_episodes).tolist()
    held_out = round(fraction * len(order))
    if held_out == 0:
        return {}
    return {"train": sorted(order[held_out:]), "valid": sorted(order[:held_out])}

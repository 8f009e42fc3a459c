"""Roll a trained policy out, as it is deployed, into a demonstration store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.data.store_writing import check_new
from flowpolicy.errors import DataError
from flowpolicy.evaluation.rollout import check_spaces
from flowpolicy.evaluation.summary import versions
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.execution.receding_horizon import ChunkPolicy, RecedingHorizon
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.progress import progress_bar
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import require
from flowpolicy_envs.rollouts import Episode, join, play

ATTEMPTS = 20
"""Episodes that are played at most for each that is kept."""


def collect_policy_store(
    checkpoint: str,
    env: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    episodes: int | None = None,
    only_successes: bool = False,
    num_steps: int | None = None,
    num_envs: int = 10,
    seed: int = 0,
    device: str = "auto",
    image_codec: str = "zstd",
    command: str = "",
) -> tuple[Path, Demonstrations]:
    """Collect episodes of a policy and write them to a store.

    Args:
        checkpoint: the policy.
        env: the task's YAML file as a mapping; None takes the checkpoint's.
        out: the store; None is ``demonstrations/<task>-policy.zarr.zip``.
        episodes: see :func:`collect_policy`, as of the next three; None is 100.
        seed: that the episodes' seeds are derived from, away from those of training and evaluation.
        device: of the policy.
        image_codec: of the store's images; see :mod:`flowpolicy.data.image_codecs`.
        command: for the store's attributes.

    Returns:
        The store's path and what was written to it.

    Raises:
        FlowPolicyError: a setting, the checkpoint or its task is not usable, or ``out`` exists; and as
            :func:`collect_policy`.
    """
    policy = FlowPolicy.load(checkpoint, resolve_device(device))
    task = task_of(policy.spec.task, env, checkpoint)
    env_id = task.simulator()
    out = out or f"demonstrations/{task.name}-policy.zarr.zip"
    check_new(out)
    first = derived_seed(seed, "collection")
    kept, played = collect_policy(
        policy, task, 100 if episodes is None else episodes, seed=first, num_envs=num_envs,
        num_steps=num_steps, only_successes=only_successes,
    )  # fmt: skip
    returns = np.array([episode.total for episode in kept])
    attributes: dict[str, Any] = {
        "task": task.name,
        "env_id": env_id,
        "env_kwargs": dict(task.env_kwargs),
        "fps": task.control_hz,
        "level": "policy",
        "source": f"episodes of {checkpoint} in {env_id}",
        "policy": policy.spec.name,
        "fingerprint": fingerprint(policy),
        "num_steps": policy.sampling.num_steps if num_steps is None else num_steps,
        "episodes_played": played,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "first_seed": first,
        "seed": seed,
        "versions": versions(),
        "command": command,
    }
    if all(episode.success is not None for episode in kept):
        attributes["success_rate"] = float(np.mean([bool(episode.success) for episode in kept]))
    demos = join(kept, attributes)
    return write_demonstrations(out, demos, image_codec=image_codec), demos


def collect_policy(
    policy: ChunkPolicy,
    task: Task,
    episodes: int,
    *,
    seed: int = 0,
    num_envs: int = 10,
    num_steps: int | None = None,
    only_successes: bool = False,
) -> tuple[list[Episode], int]:
    """Play episodes from ``seed``, ``seed + 1``, ... until there are enough.

    Episode i starts from environment seed ``seed + i`` and draws x_0 from a generator of that seed, as in an
    evaluation. All that are begun together end before the next are begun, so that a short one is not kept
    more readily than a long one.

    Args:
        policy: a policy, with or without steering.
        task: the environment and the horizons.
        episodes: how many are kept.
        seed: of the first episode.
        num_envs: episodes side by side.
        num_steps: K; None takes the policy's own.
        only_successes: keep those alone that the environment calls a success.

    Returns:
        The episodes in the order of their seeds, and how many were played up to the last.

    Raises:
        TaskError: the environment cannot be made, or is not as the policy's.
        DataError: far too few succeed, or the environment never says whether one did.
    """
    for name, number, least in (("episodes", episodes, 1), ("num_envs", num_envs, 1), ("seed", seed, 0)):
        require(number >= least, name, number, f"at least {least}")
    num_envs = min(num_envs, episodes)
    horizon = RecedingHorizon(policy, num_envs, task.execute_horizon, num_steps=num_steps)
    envs: list[Any] = []
    kept: list[Episode] = []
    played = 0
    try:
        envs += [task.make() for _ in range(num_envs)]
        check_spaces(envs[0], policy, f"Task '{task.name}'")
        with progress_bar(episodes, f"collect {task.name}") as bar:
            while played < ATTEMPTS * episodes:
                for episode in _side_by_side(horizon, envs, seed + played):
                    played += 1
                    if only_successes and episode.success is None:
                        raise DataError(
                            "The environment gives no info['success'], so no episode can be kept."
                        )
                    if episode.success or not only_successes:
                        kept.append(episode)
                        bar.update(1)
                    if len(kept) == episodes:
                        return kept, played
    finally:
        for env in envs:
            env.close()
    raise DataError(
        f"Only {len(kept)} of {played} episodes succeeded, and {episodes} are wanted; ask for fewer."
    )


def _side_by_side(horizon: RecedingHorizon, envs: Sequence[Any], first_seed: int) -> list[Episode]:
    """One episode in each environment."""
    seeds = range(first_seed, first_seed + len(envs))
    for slot, seed in enumerate(seeds):
        horizon.reset(slot, seed)
    space = envs[0].action_space

    def act(batch: Mapping[str, np.ndarray], slots: list[int]) -> np.ndarray:
        executed: np.ndarray = np.clip(horizon.actions(batch, slots), space.low, space.high)
        return executed

    return play(act, tuple(horizon.policy.spec.observation_shapes), envs, seeds)

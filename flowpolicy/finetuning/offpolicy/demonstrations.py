"""Demonstrated episodes as transitions of chunks (RLPD, Ball et al. 2023)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError
from flowpolicy.finetuning.advantages import chunk_rewards
from flowpolicy.finetuning.offpolicy.replay import Transitions
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.stores import normalized


def demonstrated(
    policy: FlowPolicy, demos: Demonstrations, execute_horizon: int, gamma: float, succeeded: bool = True
) -> Transitions:
    """Every step of every episode as the start of a chunk of T_e actions, if what follows was recorded.

    The last observation of an episode is not followed by any, so a chunk must end before it, unless the store
    says that the episode ended in a terminal state. The next chunk of an episode lies T_e later. What is
    known of the next observations is left empty. ``succeeded``: whether they are successes.

    Raises:
        DataError: the store has no rewards, or no episode is long enough.
    """
    if "reward" not in demos.arrays:
        raise DataError(
            f"{demos.source} has no rewards, so nothing can be learnt from it off-policy; give a store with "
            "data/reward, or leave the demonstrations out with offpolicy.demonstration_share=0."
        )
    observation, action, _ = normalized(policy, demos, None)
    rewards = demos.arrays["reward"].reshape(-1).astype(np.float64)
    ended = demos.arrays.get("terminated")
    is_terminal = np.zeros(demos.num_steps, bool) if ended is None else ended.reshape(-1).astype(bool)
    steps, firsts, lasts, ends = [], [], [], []
    for first, end in zip(demos.episode_starts, demos.episode_ends, strict=True):
        follows = end - 1 if not is_terminal[end - 1] else end - 1 + execute_horizon
        start = np.arange(first, max(first, min(follows - execute_horizon + 1, end)))
        steps.append(start)
        firsts.append(np.full(len(start), first))
        lasts.append(np.full(len(start), end - 1))
        ends.append(start + execute_horizon > start[-1] if len(start) else start.astype(bool))
    at, first_of, last_of = (np.concatenate(parts) for parts in (steps, firsts, lasts))
    if not len(at):
        raise DataError(f"No episode of {demos.source} has more than {execute_horizon} steps; record longer.")
    ahead = np.arange(policy.spec.action_horizon)
    rows = np.minimum(at[:, None] + ahead, last_of[:, None])
    executed = np.minimum(execute_horizon, last_of - at + 1)
    inside = (ahead[:execute_horizon] < executed[:, None]) * rewards[rows[:, :execute_horizon]]
    past = np.arange(1 - policy.spec.obs_horizon, 1)
    after = np.minimum(at + executed, last_of)
    terminal = is_terminal[np.minimum(at + executed - 1, last_of)]

    def histories(newest: NDArray[Any]) -> dict[str, torch.Tensor]:
        index = torch.from_numpy(np.maximum(newest[:, None] + past, first_of[:, None]))
        return {key: value[index.to(value.device)] for key, value in observation.items()}

    return Transitions(
        observation=histories(at),
        chunk=action[torch.from_numpy(rows).to(action.device)],
        executed=torch.as_tensor(executed, dtype=torch.float32),
        reward=torch.as_tensor(chunk_rewards(inside, gamma), dtype=torch.float32),
        discount=torch.as_tensor(~terminal * gamma ** executed.astype(np.float64), dtype=torch.float32),
        is_last=torch.from_numpy(np.concatenate(ends)),
        succeeded=torch.full((len(at),), succeeded),
        next_observation=histories(after),
        known={},
    )

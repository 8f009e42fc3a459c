"""One iteration's experience: chains are stored once, as arrays of chunks x environments."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.finetuning.advantages import AdvantageStrategy, Experience, ReturnScale, chunk_rewards
from flowpolicy.finetuning.chain import Chain, transition_mask
from flowpolicy.finetuning.critic import ValueFunction, values_of
from flowpolicy.finetuning.environments import ChunkStep
from flowpolicy.finetuning.rules.rule import Minibatch


class ChunkBuffer:
    """S chunks in each of N environments, filled by :meth:`add` in order.

    Attributes:
        explained_variance: share of the variance of the returns that :meth:`data` gave last which the critic
            had foreseen.
    """

    explained_variance = 0.0

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._observations: list[dict[str, Tensor]] = []
        self._finals: list[tuple[int, NDArray[np.int64], dict[str, Tensor]]] = []
        self._chains: list[Chain] = []
        self._steps: list[ChunkStep] = []
        self._counted = 0

    def add(
        self,
        observation: dict[str, Tensor],
        chain: Chain,
        step: ChunkStep,
        final_observation: Mapping[str, Tensor] | None,
    ) -> None:
        """One chunk of every environment.

        Args:
            observation: normalised, what the chunk was sampled from.
            chain: its chain.
            step: what the environments answered.
            final_observation: normalised, of the environments whose episode was truncated, in their order;
                None where there is none.
        """
        if final_observation is not None:
            index = np.flatnonzero(step.truncated)
            self._finals.append((len(self._steps), index, dict(final_observation)))
        self._observations.append(observation)
        self._chains.append(chain)
        self._steps.append(step)

    def __len__(self) -> int:
        return len(self._steps)

    def data(
        self,
        critic: ValueFunction,
        after: dict[str, Tensor],
        scale: ReturnScale,
        strategy: AdvantageStrategy,
    ) -> Minibatch:
        """All S * N chunks, with advantages (not yet normalised) and returns in scaled units.

        Args:
            critic: values of observations, in scaled units.
            after: normalised observation after the last chunk.
            scale: of rewards; ``scale.value`` is fixed here for the iteration.
            strategy: makes advantages of rewards and values.
        """
        count, envs = len(self._steps), len(self._steps[0].executed)
        observation = self.observations()
        values = values_of(critic, observation).reshape(count, envs).double().cpu().numpy()
        last = values_of(critic, after).double().cpu().numpy()
        next_values = np.concatenate([values[1:], last[None]])
        if self._finals:
            final = {key: torch.cat([rows[key] for _, _, rows in self._finals]) for key in observation}
            rows = np.concatenate([np.full(len(index), step) for step, index, _ in self._finals])
            columns = np.concatenate([index for _, index, _ in self._finals])
            next_values[rows, columns] = values_of(critic, final).double().cpu().numpy()
        executed = self._executed()
        terminated = np.stack([step.terminated for step in self._steps])
        ended = terminated | np.stack([step.truncated for step in self._steps])
        rewards = chunk_rewards(self.rewards() / scale.value, strategy.gamma)
        advantages, returns = strategy(Experience(rewards, executed, terminated, ended, values, next_values))
        spread = float(returns.var())
        self.explained_variance = 1 - float((returns - values).var()) / spread if spread else math.nan
        x, mean, std = (torch.cat(parts) for parts in zip(*self._chains, strict=True))
        device = x.device
        mask = transition_mask(
            torch.as_tensor(executed.reshape(-1), device=device), mean.shape[1], x.shape[2]
        )
        advantage, target = (
            torch.as_tensor(rows.reshape(-1), dtype=torch.float32, device=device)
            for rows in (advantages, returns)
        )
        return Minibatch(observation, x, mean, std, mask, advantage, target)

    def observations(self) -> dict[str, Tensor]:
        """Key -> ``(S x N, T_o, *shape)``, normalised."""
        return {key: torch.cat([row[key] for row in self._observations]) for key in self._observations[0]}

    def rewards(self) -> NDArray[np.float64]:
        """``(S, N, T_e)`` as the environments gave them."""
        return np.stack([step.rewards for step in self._steps]).astype(np.float64)

    def return_moments(self, scale: ReturnScale) -> tuple[float, float, float, float]:
        """What ``scale`` takes of the running returns since the last call, which go on from that one's.

        Of a group they are those of the first environment.
        """
        new = np.s_[self._counted :, :: len(self._steps[0].executed) // len(scale.running)]
        self._counted = len(self._steps)
        ended = np.stack([step.terminated | step.truncated for step in self._steps])
        return scale.run(self.rewards()[new], self._executed()[new], ended[new])

    def reward_range(self) -> tuple[float, float, float]:
        """Lowest and highest reward of an executed step; 1 where an episode was terminated, else 0."""
        rewards = self.rewards()
        given = rewards[np.arange(rewards.shape[-1]) < self._executed()[..., None]]
        is_terminated = any(step.terminated.any() for step in self._steps)
        return float(given.min(initial=np.inf)), float(given.max(initial=-np.inf)), float(is_terminated)

    def _executed(self) -> NDArray[np.int64]:
        return np.stack([step.executed for step in self._steps])

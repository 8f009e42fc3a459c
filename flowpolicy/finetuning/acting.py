"""Acting by chunks as a stable-baselines3 policy: raw observations in, one action a call out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from flowpolicy.errors import FlowPolicyError
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.policy import FlowPolicy

State = tuple[NDArray[Any], ...]


def spaces_of(policy: FlowPolicy) -> tuple[spaces.Space[Any], spaces.Box]:
    """Observation and action space of a policy that knows no environment: the shapes, without bounds."""
    boxes = {
        key: spaces.Box(*feature.bounds, feature.shape, feature.dtype)
        for key, feature in policy.spec.features.items()
    }
    is_plain = tuple(boxes) == ("observation",)
    observation = boxes["observation"] if is_plain else spaces.Dict(dict(boxes))
    return observation, spaces.Box(-np.inf, np.inf, (policy.spec.action_dim,), np.float32)


class Decision(Protocol):
    """What was sampled for B observations: at least the chunks."""

    @property
    def chunk(self) -> Tensor:
        """``(B, T, A)``, normalised."""
        ...


class ChunkActor(BasePolicy):
    """A flow policy that acts in environments of single steps.

    Args:
        observation_space: of one environment: a Box, which is the key ``observation``, or a Dict of Boxes.
        action_space: of one environment.
        flow_policy: the policy.
        execute_horizon: T_e.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        flow_policy: FlowPolicy,
        execute_horizon: int,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.flow_policy, self.execute_horizon = flow_policy, execute_horizon

    @abstractmethod
    def prepare(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of normalised observations for learning: images perhaps as tokens."""

    @abstractmethod
    def sample(self, observation: Mapping[str, Tensor], generator: torch.Generator | None) -> Decision:
        """What to do in each of B prepared observations while learning, with exploration."""

    @abstractmethod
    def sample_chunks(
        self,
        histories: Mapping[str, NDArray[Any]],
        *,
        deterministic: bool,
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """Action chunks ``(n, T, A)`` in physical units for histories, key -> ``(n, T_o, *shape)``.

        ``deterministic`` is the policy as it will be deployed.
        """

    @abstractmethod
    def deployed(self) -> FlowPolicy:
        """A copy of the policy alone, marked with the K that it is tuned for."""

    def executed(self, chunk: Tensor) -> Tensor:
        """Normalised chunks ``(B, T, A)`` as the environment executes them, within its bounds."""
        space, normalizer = self.action_space, self.flow_policy.action_normalizer
        assert isinstance(space, spaces.Box)
        low, high = (torch.as_tensor(bound).to(chunk) for bound in (space.low, space.high))
        return normalizer.normalize(normalizer.denormalize(chunk).clamp(low, high))

    def bounds(self) -> Tensor:
        """Least and largest value of each number of an action that is executed when deployed, ``(2, A)``,
        normalised.
        """
        clip = self.flow_policy.config.action_clip
        ends = torch.tensor([[-clip], [clip]], device=self.device)
        return self.executed(ends.expand(2, self.flow_policy.spec.action_dim))

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: State | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], State | None]:
        """The next action in each environment, clipped to the action space.

        Args:
            observation: of one environment or of n, as the environment gives it.
            state: what the last call returned; None starts every episode. It holds
                the observation history of each key ``(n, T_o, *shape)``, the sampled chunk
                ``(n, T_e, A)`` and how many of its actions are used ``(n,)``.
            episode_start: ``(n,)``, where an episode begins: history and chunk are dropped there.
            deterministic: without injected noise, as deployed; else as chunks are sampled in fine-tuning.

        Returns:
            Actions ``(n, A)``, or ``(A,)`` for a single observation, and the state for the next call.
        """
        rows, is_single = self._rows(observation)
        keys = tuple(self.flow_policy.spec.observation_shapes)
        count, horizon = len(rows[keys[0]]), self.flow_policy.spec.obs_horizon
        if state is None:
            histories = HistoryBuffer(
                {key: (rows[key].shape[1:], rows[key].dtype) for key in keys}, count, horizon
            )
            sampled = np.zeros((count, self.execute_horizon, self.flow_policy.spec.action_dim), np.float32)
            used = np.full(count, self.execute_horizon)
        else:
            *kept, sampled, used = (array.copy() for array in state)
            fresh = np.zeros(count, bool) if episode_start is None else np.asarray(episode_start, bool)
            histories = HistoryBuffer.of(dict(zip(keys, kept, strict=True)))
            histories.restart(fresh)
            used[fresh] = self.execute_horizon
        histories.add(rows)
        empty = np.flatnonzero(used >= self.execute_horizon)
        if empty.size:
            chunks = self.sample_chunks(histories.copy(empty), deterministic=deterministic)
            sampled[empty] = chunks[:, : self.execute_horizon]
            used[empty] = 0
        space = self.action_space
        assert isinstance(space, spaces.Box)
        actions = np.clip(sampled[np.arange(count), used], space.low, space.high).astype(space.dtype)
        used = used + 1
        return actions[0] if is_single else actions, (*histories.arrays.values(), sampled, used)

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        """Of stable-baselines3's interface: the first action of a fresh chunk ``(n, A)``."""
        batch = observation if isinstance(observation, Mapping) else {"observation": observation}
        actions, _ = self.predict(
            {key: value.cpu().numpy() for key, value in batch.items()}, deterministic=deterministic
        )
        return torch.as_tensor(actions)

    def _rows(self, observation: Any) -> tuple[dict[str, NDArray[Any]], bool]:
        """Key -> ``(n, *shape)``, and whether it was a single observation without n."""
        if isinstance(observation, tuple):
            raise FlowPolicyError(
                "predict() got a tuple; give it the observation alone, without the info of env.reset()."
            )
        batch = observation if isinstance(observation, Mapping) else {"observation": observation}
        rows, is_single = {}, False
        for key, feature in self.flow_policy.spec.features.items():
            if key not in batch:
                raise FlowPolicyError(
                    f"The policy needs the observation '{key}' and got {', '.join(sorted(batch))}."
                )
            array = feature.array(batch[key])
            is_single = array.ndim == len(feature.shape)
            rows[key] = array[None] if is_single else array
        return rows, is_single

"""The networks of ReinFlow as a stable-baselines3 policy: acting in raw environments, one action a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from flowpolicy.errors import FlowPolicyError
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.finetuning.chain import Chain, NoisyFlow
from flowpolicy.finetuning.critic import Critic
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.flow.network import encode_images
from flowpolicy.models.encoders import ObservationEncoder
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.observation_features import ObservationFeatures

State = tuple[NDArray[Any], ...]
NETWORK_SETTINGS = (
    "num_steps", "grid", "execute_horizon", "noise", "critic_hidden", "image_encoder", "critic_encoder",
)  # fmt: skip
"""Settings of ReinFlow that :class:`FlowActorCritic` is built from."""


def spaces_of(policy: FlowPolicy) -> tuple[spaces.Space[Any], spaces.Box]:
    """Observation and action space of a policy that knows no environment: the shapes, without bounds."""
    boxes = {
        key: spaces.Box(*feature.bounds, feature.shape, feature.dtype)
        for key, feature in policy.spec.features.items()
    }
    is_plain = tuple(boxes) == ("observation",)
    observation = boxes["observation"] if is_plain else spaces.Dict(dict(boxes))
    return observation, spaces.Box(-np.inf, np.inf, (policy.spec.action_dim,), np.float32)


class FlowActorCritic(BasePolicy):
    """A flow policy, its noise network, and a critic.

    Args:
        observation_space: of one environment: a Box, which is the key ``observation``, or a Dict of Boxes.
        action_space: of one environment.
        flow_policy: the pretrained policy; its network is trained in place.
        num_steps: K.
        grid: of flow times; see :class:`NoisyFlow`.
        execute_horizon: T_e.
        noise: settings of the noise network.
        critic_hidden: widths of the critic.
        image_encoder: ``frozen`` or ``trained``.
        critic_encoder: ``shared`` or ``own``.
        injects_noise: chunks are sampled from the chain with its noise, or else from the flow alone.
        branches: the noise is that of one transition of each chain; see :meth:`NoisyFlow.sample`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        *,
        flow_policy: FlowPolicy,
        num_steps: int,
        execute_horizon: int,
        noise: NoiseConfig,
        critic_hidden: tuple[int, ...],
        grid: dict[str, Any] | None = None,
        image_encoder: str = "frozen",
        critic_encoder: str = "shared",
        injects_noise: bool = True,
        branches: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space)
        self.flow_policy = flow_policy
        self.execute_horizon = execute_horizon
        self.injects_noise, self.branches = injects_noise, branches
        self.flow = NoisyFlow(flow_policy, num_steps, noise, grid)
        network, features = flow_policy.network, flow_policy.spec.features
        own = critic_encoder == "own"
        self.critic = Critic(
            ObservationFeatures(network, features, flow_policy.spec.obs_horizon, own), critic_hidden
        )
        self.is_frozen = image_encoder == "frozen"
        encoder = getattr(network, "encoder", None)
        if isinstance(encoder, ObservationEncoder):
            encoder.cameras.requires_grad_(not self.is_frozen)
        self.eval()  # dropout would make the likelihood inexact

    def actor_parameters(self) -> list[torch.nn.Parameter]:
        """Of the flow and of its noise."""
        return [parameter for parameter in self.flow.parameters() if parameter.requires_grad]

    def prepare(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an iteration keeps of normalised observations: images as tokens, where nobody will need the
        images again.
        """
        if self.is_frozen and not self.critic.features.has_encoders:
            with torch.no_grad():
                return encode_images(self.flow.network, observation)
        return observation

    def values(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The critic's values ``(B,)`` of prepared observations."""
        if not self.critic.features.has_encoders:
            with torch.no_grad():
                observation = encode_images(self.flow.network, observation)
        values: Tensor = self.critic(observation)
        return values

    def sample(self, observation: Mapping[str, Tensor], generator: torch.Generator | None) -> Chain:
        """A chain for each of B prepared observations from a fresh x_0; see :class:`NoisyFlow`."""
        policy = self.flow_policy
        shape = (len(next(iter(observation.values()))), *policy.spec.chunk_shape)
        start = torch.randn(shape, generator=generator, device=policy.device)
        if not self.injects_noise:
            return self.flow.sample_flow(observation, start)
        return self.flow.sample(observation, start, generator, branches=self.branches)

    def executed(self, chunk: Tensor) -> Tensor:
        """Normalised chunks ``(B, T, A)`` as the environment executes them, within its bounds."""
        space, normalizer = self.action_space, self.flow_policy.action_normalizer
        assert isinstance(space, spaces.Box)
        low, high = (torch.as_tensor(bound).to(chunk) for bound in (space.low, space.high))
        return normalizer.normalize(normalizer.denormalize(chunk).clamp(low, high))

    def sample_chunks(
        self,
        histories: Mapping[str, NDArray[Any]],
        *,
        deterministic: bool,
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """Action chunks ``(n, T, A)`` in physical units for histories, key -> ``(n, T_o, *shape)``.

        ``deterministic`` is the flow as it will be deployed: x_0 ~ N(0, I) and no injected noise.
        """
        policy = self.flow_policy
        if deterministic:
            sampling = self.flow.sampling
            chunk = policy.act(histories, sampler=sampling, generator=generator, allow_any_steps=True)
        else:
            chain = self.sample(policy.normalize_observations(histories), generator)
            chunk = policy.action_normalizer.denormalize(chain.x[:, -1])
        physical: NDArray[np.float32] = chunk.cpu().numpy()
        return physical

    def deployed(self) -> FlowPolicy:
        """A copy of the flow alone, marked with the K that it is tuned for."""
        config = dataclasses.replace(
            self.flow_policy.config,
            tuned=self.flow.sampling,
            execute_horizon=self.execute_horizon,  # actions beyond it were never trained
        )
        result = FlowPolicy(config).to(self.flow_policy.device)
        result.load_state_dict(self.flow_policy.state_dict())
        return result.eval()

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

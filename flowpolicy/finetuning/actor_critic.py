"""The networks of ReinFlow as a stable-baselines3 policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.finetuning.acting import ChunkActor
from flowpolicy.finetuning.chain import Chain, NoisyFlow
from flowpolicy.finetuning.critic import Critic
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.flow.network import encode_images
from flowpolicy.models.encoders import ObservationEncoder
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.pretraining.ema import EMA

NETWORK_SETTINGS = (
    "num_steps", "grid", "execute_horizon", "noise", "critic_hidden", "image_encoder", "critic_encoder",
    "ema_decay",
)  # fmt: skip
"""Settings of ReinFlow that :class:`FlowActorCritic` is built from."""


class FlowActorCritic(ChunkActor):
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
        injects_noise: chunks are sampled from the chain with its noise, or else from the flow alone; or the
            share of the rows that are, but all of a flow that knows only its chain.
        branches: the noise is that of one transition of each chain; see :meth:`NoisyFlow.sample`.
        ema_decay: of the average of the weights, which is deployed; None deploys the weights themselves.
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
        injects_noise: bool | float = True,
        branches: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, flow_policy, execute_horizon)
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
        self._ema = None if ema_decay is None else EMA(flow_policy, ema_decay)
        self.averaged = self._ema.network if self._ema else None
        self.eval()  # dropout would make the likelihood inexact

    def actor_parameters(self) -> list[torch.nn.Parameter]:
        """Of the flow and of its noise."""
        return [parameter for parameter in self.flow.parameters() if parameter.requires_grad]

    def follow(self, iterations: int) -> None:
        """The average of the weights, if there is one, moves towards them; ``iterations`` are done so far."""
        if self._ema is not None:
            self._ema.update(iterations)

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
        noisy = 1.0 if self.flow.knows_only_its_chain else float(self.injects_noise)
        return self.flow.sample(observation, start, generator, branches=self.branches, noisy=noisy)

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
            chosen = self.averaged or policy
            chunk = chosen.act(histories, sampler=sampling, generator=generator, allow_any_steps=True)
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
        result.load_state_dict((self.averaged or self.flow_policy).state_dict())
        return result.eval()

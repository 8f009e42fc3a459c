"""The networks of off-policy fine-tuning as a stable-baselines3 policy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from flowpolicy.features.presence import optional_keys
from flowpolicy.finetuning.acting import ChunkActor
from flowpolicy.flow.network import encode_images
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.encoders import ObservationEncoder
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import require


@dataclass(frozen=True)
class Chosen:
    """What to do in B observations.

    Attributes:
        chunk: ``(B, T, A)``, normalised.
        known: what the algorithm keeps of the observations, name -> ``(B, ...)``.
    """

    chunk: Tensor
    known: dict[str, Tensor]


class Acting(Protocol):
    """What the networks need of an :class:`~flowpolicy.finetuning.offpolicy.algorithms.Algorithm`."""

    def extra(self, policy: FlowPolicy, members: int, hidden: tuple[int, ...]) -> nn.ModuleDict:
        """Networks that are not deployed."""
        ...

    def act(
        self, networks: Any, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Chunks to execute while learning, and what is kept of the observations."""
        ...

    def known(
        self, networks: Any, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """What is kept of the observations alone."""
        ...


class SteeredActor(ChunkActor):
    """A flow policy with a steering, and what only learning needs.

    Args:
        observation_space: of one environment.
        action_space: likewise.
        flow_policy: with the algorithm's steering.
        algorithm: what is learnt.
        sampling: K, solver and grid.
        members: of the critic's ensemble.
        hidden: widths of the critic.

    Attributes:
        extra: networks that are not deployed.
        follows_flow: what is sampled while learning is the flow's own, as it was pretrained.
    """

    follows_flow = False

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        *,
        flow_policy: FlowPolicy,
        algorithm: Acting,
        sampling: SamplerSpec,
        members: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__(observation_space, action_space, flow_policy, flow_policy.spec.execute_horizon)
        self.algorithm, self.sampling = algorithm, sampling
        self.extra = algorithm.extra(flow_policy, members, hidden)
        encoder = getattr(flow_policy.network, "encoder", None)
        if isinstance(encoder, ObservationEncoder):
            encoder.cameras.requires_grad_(False)  # the replay keeps their tokens
        self.eval()

    @property
    def steering(self) -> Any:
        """The algorithm's own."""
        return self.flow_policy.steering

    def adopt_bounds(self) -> None:
        """Hold chunks within the bounds of the environment's actions."""
        for kept, bound in zip((self.steering.low, self.steering.high), self.bounds(), strict=True):
            kept.copy_(bound)

    def prepare(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images as the flow's tokens."""
        with torch.no_grad():
            return encode_images(self.flow_policy.network, observation)

    @torch.no_grad()
    def sample(self, observation: Mapping[str, Tensor], generator: torch.Generator | None) -> Chosen:
        """What to do in each of B prepared observations while learning."""
        if self.follows_flow:
            chunk = self.flow_chunks(observation, self.draw(observation, 1, generator))[:, 0]
            return Chosen(chunk, self.algorithm.known(self, observation, generator))
        return Chosen(*self.algorithm.act(self, observation, generator))

    @torch.no_grad()
    def known(self, observation: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """What the algorithm keeps of prepared observations."""
        return self.algorithm.known(self, observation, generator)

    def flow_chunks(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """The flow's own chunks from M x_0 for each observation, ``(B, M, T, A)``, within bounds."""
        chunks: Tensor = self.steering.within(self.flow_policy.proposals(observation, noise, self.sampling))
        return chunks

    def draw(
        self, observation: Mapping[str, Tensor], draws: int, generator: torch.Generator | None
    ) -> Tensor:
        """x_0 ``(B, M, T, A)``, M of them for each observation."""
        rows, policy = len(next(iter(observation.values()))), self.flow_policy
        return torch.randn((rows, draws, *policy.spec.chunk_shape), generator=generator, device=policy.device)

    def sample_chunks(
        self,
        histories: Mapping[str, NDArray[Any]],
        *,
        deterministic: bool,
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """See :class:`ChunkActor`."""
        policy = self.flow_policy
        if deterministic:
            chunk = policy.act(histories, sampler=self.sampling, generator=generator, allow_any_steps=True)
        else:
            observation = self.prepare(policy.normalize_observations(histories))
            chunk = policy.action_normalizer.denormalize(self.sample(observation, generator).chunk)
        physical: NDArray[np.float32] = chunk.cpu().numpy()
        return physical

    def deployed(self) -> FlowPolicy:
        """See :class:`ChunkActor`."""
        result = FlowPolicy(dataclasses.replace(self.flow_policy.config, tuned=self.sampling))
        result.load_state_dict(self.flow_policy.state_dict())
        return result.to(self.flow_policy.device).eval()


def steered(policy: FlowPolicy, steering: dict[str, Any], execute_horizon: int) -> FlowPolicy:
    """``policy`` with a steering that has not learnt yet; a copy, where it has that one already.

    Raises:
        ConfigError: it has another one, is no flow, or learns actions otherwise than as they are.
    """
    policy.objective.require_flow()
    policy.action_space.require_plain("Fine-tuning")
    lacking = ", ".join(optional_keys(policy.spec.features))
    allowed = "observed in every store that a policy to fine-tune was pretrained on"
    require(not lacking, "data.observation_keys", lacking, allowed)
    if policy.config.steering == steering and policy.spec.execute_horizon == execute_horizon:
        return copy.deepcopy(policy)
    policy.require_unsteered("Off-policy fine-tuning")
    config = dataclasses.replace(policy.config, steering=steering, execute_horizon=execute_horizon)
    result = FlowPolicy(config).to(policy.device)
    result.load_state_dict(policy.state_dict(), strict=False)
    return result.eval()

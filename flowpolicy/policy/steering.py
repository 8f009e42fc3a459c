"""What chooses among a flow's chunks, changes them, or chooses the x_0 that they come from.

A steering is learnt around a flow whose own weights may stay as they are, and is saved with it: a policy
with one samples, is evaluated, served and run on a robot as any other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from flowpolicy.flow.network import Network
from flowpolicy.models.ensemble import Ensemble
from flowpolicy.plugins import register
from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.ranges import Allowed, between, positive_to
from flowpolicy.settings import Settings, build, choose
from flowpolicy.spec import PolicySpec

FlowOf = Callable[[Tensor], Tensor]
"""The chunks ``(B, M, T, A)`` of M draws of x_0 ``(B, M, T, A)`` for each of B observations."""
Observation = Mapping[str, Tensor]
"""Normalised, key -> ``(B, T_o, *shape)``, images as the flow's tokens."""

_FEW = Allowed(lambda widths: len(widths) <= 16, "at most 16 widths between 1 and 8192")
Widths = Annotated[tuple[Annotated[int, between(1, 8192)], ...], _FEW]
_LOG_STD = (-5.0, 2.0)
EDIT_LOG_STD, LATENT_LOG_STD = -2.0, 0.0


@dataclass(frozen=True)
class SteeringConfig(Settings, prefix="steering"):
    """Settings of a steering; each has a subclass of its own."""

    @property
    def draws(self) -> int:
        """How many x_0 it takes for a chunk, M."""
        return 1


class Steering(nn.Module, ABC):
    """Chunks from a flow.

    Args:
        config: its settings.
        network: of the flow.
        spec: the policy's observations and actions, as the network learns them.
        clip: bound of an action in normalised units.

    Attributes:
        draws: how many x_0 it takes for a chunk, M.
        explores: whether it acts as while it learns, with noise.
        low: least value of each dimension of an executed action in normalised units, ``(A,)``.
        high: largest, likewise.
    """

    name: ClassVar[str]
    Config: ClassVar[type[SteeringConfig]]
    low: Tensor
    high: Tensor

    def __init__(self, config: Any, network: Network, spec: PolicySpec, clip: float) -> None:
        super().__init__()
        self.draws: int = config.draws
        self.explores = False
        self.register_buffer("low", torch.full((spec.action_dim,), -clip))
        self.register_buffer("high", torch.full((spec.action_dim,), clip))

    @abstractmethod
    def chunk(self, observation: Observation, noise: Tensor, flow: FlowOf) -> Tensor:
        """What is executed, ``(B, T, A)``, from x_0 ``(B, M, T, A)``."""

    def within(self, chunk: Tensor) -> Tensor:
        """Chunks ``(..., A)`` as the environment bounds them."""
        return torch.minimum(torch.maximum(chunk, self.low), self.high)


class ChunkCritic(nn.Module):
    """Q(o, chunk) of the T_e actions of a chunk that are executed, E estimates of it.

    Args:
        network: of the flow, whose tokens of images it reads.
        spec: observations and actions.
        members: E.
        hidden: width of each hidden layer.
        horizon: actions that it looks at; None: T_e. Of x_0, whose every number has a part in each action, T.
    """

    def __init__(
        self,
        network: Network,
        spec: PolicySpec,
        members: int,
        hidden: tuple[int, ...],
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        self.horizon = spec.execute_horizon if horizon is None else horizon
        self.features = ObservationFeatures(network, spec.features, spec.obs_horizon)
        self.ensemble = Ensemble(members, self.features.size + self.horizon * spec.action_dim, hidden)

    def forward(self, observation: Observation, chunks: Tensor, members: Tensor | None = None) -> Tensor:
        """``(n, B, M)`` of M chunks for each observation, ``(B, M, T, A)``, of all members or some."""
        rows, count = chunks.shape[:2]
        features = self.features(observation)[:, None].expand(rows, count, -1)
        inputs = torch.cat([features, chunks[:, :, : self.horizon].flatten(2)], dim=-1).flatten(0, 1)
        values: Tensor = self.ensemble(inputs, members)
        return values.view(-1, rows, count)


class BoundedGaussian(nn.Module):
    """A Gaussian through tanh, which gives numbers within +-``bound``.

    Args:
        size: of the input.
        shape: of what it gives.
        hidden: width of each hidden layer.
        bound: of each number.
        log_std: logarithm of the standard deviation before tanh that it starts with.
    """

    def __init__(
        self, size: int, shape: tuple[int, ...], hidden: tuple[int, ...], bound: float, log_std: float
    ) -> None:
        super().__init__()
        self.shape, self.bound = shape, bound
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU(inplace=True)]
            size = width
        last = nn.Linear(size, 2 * torch.Size(shape).numel())
        nn.init.zeros_(last.weight)  # its mean is 0 at first
        nn.init.zeros_(last.bias)
        low, high = _LOG_STD
        raw = math.atanh(2 * (log_std - low) / (high - low) - 1)
        nn.init.constant_(last.bias[torch.Size(shape).numel() :], raw)
        self.layers = nn.Sequential(*layers, last)

    def moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation before tanh, ``(..., *shape)`` of ``(..., size)``."""
        mean, raw = self.layers(inputs).unflatten(-1, (2, *self.shape)).unbind(-1 - len(self.shape))
        low, high = _LOG_STD
        return mean, low + 0.5 * (high - low) * (1 + torch.tanh(raw))

    def mode(self, inputs: Tensor) -> Tensor:
        """What it gives without its noise."""
        return self.bound * torch.tanh(self.moments(inputs)[0])

    def chosen(self, inputs: Tensor, explores: bool) -> Tensor:
        """A sample, or what it gives without its noise."""
        return self.sample(inputs, None)[0] if explores else self.mode(inputs)

    def sample(
        self, inputs: Tensor, generator: torch.Generator | None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A sample ``(..., *shape)`` and its log-density ``(...)`` in units of the bound, with gradients.

        It is made of ``noise`` of the sample's shape, or else of the generator's.
        """
        mean, log_std = self.moments(inputs)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        raw = mean + log_std.exp() * noise
        # log(1 - tanh(x)^2) without cancellation, Haarnoja et al. 2018, appendix C
        slope = 2 * (0.6931471805599453 - raw - nn.functional.softplus(-2 * raw))
        density = -0.5 * noise**2 - log_std - 0.9189385332046727 - slope
        return self.bound * torch.tanh(raw), density.flatten(-len(self.shape)).sum(-1)


STEERINGS: dict[str, type[Steering]] = {}


@dataclass(frozen=True)
class BestOfConfig(SteeringConfig):
    """Settings of :class:`BestOf`.

    Attributes:
        proposals: chunks that the critic chooses from.
        members: of the critic's ensemble.
        hidden: width of each of its hidden layers.
    """

    proposals: Annotated[int, between(1, 1024)] = 8
    members: Annotated[int, between(1, 100)] = 5
    hidden: Widths = (256, 256)

    @property
    def draws(self) -> int:
        """One for each proposal."""
        return self.proposals


@register(STEERINGS)
class BestOf(Steering):
    """The best of several chunks from the flow, by the mean of a critic's ensemble."""

    name, Config = "best_of", BestOfConfig

    def __init__(self, config: BestOfConfig, network: Network, spec: PolicySpec, clip: float) -> None:
        super().__init__(config, network, spec, clip)
        self.critic = ChunkCritic(network, spec, config.members, config.hidden)

    def chunk(self, observation: Observation, noise: Tensor, flow: FlowOf) -> Tensor:
        """See :class:`Steering`."""
        return self.best(observation, self.within(flow(noise)))

    def best(self, observation: Observation, chunks: Tensor) -> Tensor:
        """The one ``(B, T, A)`` of ``(B, M, T, A)`` with the highest value."""
        chosen = self.critic(observation, chunks).mean(0).argmax(1)
        return chunks[torch.arange(len(chunks), device=chunks.device), chosen]


@dataclass(frozen=True)
class EditedConfig(BestOfConfig):
    """Settings of :class:`Edited`.

    Attributes:
        bound: of an edit in normalised units.
        edit_hidden: width of each hidden layer of the edit policy.
        samples_edits: edits have their noise, so that the critic chooses among more that differ.
    """

    bound: Annotated[float, positive_to(10)] = 0.05
    edit_hidden: Widths = (256, 256)
    samples_edits: bool = False


@register(STEERINGS)
class Edited(BestOf):
    """The best of several chunks from the flow and of their edits (EXPO)."""

    name, Config = "edited", EditedConfig

    def __init__(self, config: EditedConfig, network: Network, spec: PolicySpec, clip: float) -> None:
        super().__init__(config, network, spec, clip)
        self.features = ObservationFeatures(network, spec.features, spec.obs_horizon)
        self.horizon, self.samples_edits = spec.execute_horizon, config.samples_edits
        shape = (self.horizon, spec.action_dim)
        size = self.features.size + torch.Size(shape).numel()
        self.edits = BoundedGaussian(size, shape, config.edit_hidden, config.bound, EDIT_LOG_STD)

    def chunk(self, observation: Observation, noise: Tensor, flow: FlowOf) -> Tensor:
        """See :class:`Steering`. The noise of an edit, where it has some, is the next one's x_0."""
        chunks = self.within(flow(noise))
        inputs = self.inputs(observation, chunks)
        if self.samples_edits:
            edits, _ = self.edits.sample(inputs, None, noise.roll(-1, 1)[:, :, : self.horizon])
        else:
            edits = self.edits.chosen(inputs, self.explores)
        edited = self.edited(chunks, edits)
        return self.best(observation, torch.cat([chunks, edited], dim=1))

    def inputs(self, observation: Observation, chunks: Tensor) -> Tensor:
        """What the edit policy sees, ``(B, M, size)``."""
        features = self.features(observation)[:, None].expand(*chunks.shape[:2], -1)
        return torch.cat([features, chunks[:, :, : self.horizon].flatten(2)], dim=-1)

    def edited(self, chunks: Tensor, edits: Tensor) -> Tensor:
        """Chunks ``(B, M, T, A)`` with edits ``(B, M, T_e, A)`` of their executed part, within bounds."""
        executed = chunks[:, :, : self.horizon] + edits
        return self.within(torch.cat([executed, chunks[:, :, self.horizon :]], dim=2))


@dataclass(frozen=True)
class LatentConfig(SteeringConfig):
    """Settings of :class:`Latent`.

    Attributes:
        bound: of a number of x_0.
        hidden: width of each hidden layer.
    """

    bound: Annotated[float, positive_to(10)] = 1.5
    hidden: Widths = (256, 256)


@register(STEERINGS)
class Latent(Steering):
    """The x_0 that a chunk comes from is an actor's, and not a draw from N(0, I) (DSRL)."""

    name, Config = "latent", LatentConfig

    def __init__(self, config: LatentConfig, network: Network, spec: PolicySpec, clip: float) -> None:
        super().__init__(config, network, spec, clip)
        self.features = ObservationFeatures(network, spec.features, spec.obs_horizon)
        self.actor = BoundedGaussian(
            self.features.size, spec.chunk_shape, config.hidden, config.bound, LATENT_LOG_STD
        )

    def chunk(self, observation: Observation, noise: Tensor, flow: FlowOf) -> Tensor:
        """See :class:`Steering`; the given x_0 has no effect, and the actor no noise unless it explores."""
        latent = self.actor.chosen(self.features(observation), self.explores)
        return self.within(flow(latent[:, None]))[:, 0]


def steering_config(settings: Mapping[str, Any]) -> tuple[type[Steering], SteeringConfig]:
    """The steering that ``settings["name"]`` names, and its settings.

    Raises:
        ConfigError: an unknown name, an unknown setting, or one out of range.
    """
    kind = choose(STEERINGS, settings.get("name", ""), "steering.name")
    return kind, build(kind.Config, {k: v for k, v in settings.items() if k != "name"}, "steering")

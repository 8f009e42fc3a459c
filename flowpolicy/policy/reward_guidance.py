"""Guidance by a learnt reward: what a policy that was tuned on preferences prefers, as strongly as asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.flow.guidance import GUIDANCES, Guidance, GuidedChunk
from flowpolicy.flow.network import Velocity
from flowpolicy.flow.network import field as velocity_field
from flowpolicy.plugins import register
from flowpolicy.policy.flow_policy import FlowPolicy
from flowpolicy.ranges import NonNegativeFloat


@register(GUIDANCES)
@dataclass(frozen=True)
class RewardGuidance(Guidance):
    """v + w (1 - t) / t dr/dx, with the reward r(o, x, t) = log p_tuned(x | o) - log p(x | o) at time t.

    That is the reward that direct preference optimisation has learnt, in units of its temperature (Rafailov
    et al. 2023, equation 5), for noisy chunks too. Since the score of a flow is (t v - x) / (1 - t), the sum
    is v + w (v_tuned - v): the policy itself for w = 0, the tuned one for w = 1, and more of it beyond. A
    step costs one evaluation more.

    Attributes:
        checkpoint: of the tuned policy, which has the normalisers of the one that is guided.
        weight: w.
    """

    name: ClassVar[str] = "reward"
    checkpoint: str
    weight: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        tuned = FlowPolicy.load(self.checkpoint).requires_grad_(False)
        tuned.objective.require_flow()
        tuned.require_unsteered("Guidance by a learnt reward")
        object.__setattr__(self, "_tuned", tuned)  # of a frozen dataclass, and no setting

    def bend(self, velocity: Velocity, chunk: GuidedChunk) -> Velocity:
        """See the class.

        Raises:
            ConfigError: the tuned policy means other actions by the same numbers.
        """
        tuned: FlowPolicy = vars(self)["_tuned"].to(chunk.noise.device)
        observation = tuned.check_observations(chunk.observation)
        if chunk.noise.shape[1:] != tuned.spec.noise_shape or not torch.equal(
            chunk.physical(chunk.noise),
            tuned.decode(tuned.action_normalizer.denormalize(chunk.noise), observation),
        ):
            raise ConfigError(
                f"guidance.checkpoint is {self.checkpoint}, to which the same numbers are other actions than "
                "to the policy that it is to guide; take one that was fine-tuned from it."
            )
        context = tuned.network.encode(tuned.normalize(observation))
        preferred = velocity_field(tuned.network, context, tuned.objective.step_size)

        return self.mixed(velocity, preferred)

    def mixed(self, velocity: Velocity, preferred: Velocity) -> Velocity:
        """v + w (v' - v)."""

        def bent(x: Tensor, t: float, h: float) -> Tensor:
            v = velocity(x, t, h)
            return v + self.weight * (preferred(x, t, h) - v)

        return bent

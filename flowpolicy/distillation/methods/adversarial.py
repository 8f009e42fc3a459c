"""An adversarial finish of a student that is distilled already (after TReFT, Li et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from flowpolicy.data.sampling import Batch
from flowpolicy.distillation.methods.direct import Direct
from flowpolicy.flow.network import Network, encode_images
from flowpolicy.flow.objective import Auxiliary, Draws, Metrics
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.ranges import NonNegativeFloat, positive_to

WIDTHS = (256, 256)


class ChunkCritic(nn.Module):
    """D(o, x), an MLP: the higher, the more like the teacher's is chunk x at o. It starts at 0 everywhere.

    Args:
        teacher: whose observations, encoders of images, and chunks these are.
        widths: of the hidden layers. Between them is SiLU, which has the second derivatives that the
            gradient penalties need, and no normalisation (Huang et al. 2024, section 3).
    """

    def __init__(self, teacher: FlowPolicy, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        spec = teacher.spec
        self.features = ObservationFeatures(teacher.network, spec.features, spec.obs_horizon)
        size, layers = self.features.size + spec.action_horizon * spec.action_dim, list[nn.Module]()
        for width in widths:
            layers += [nn.Linear(size, width), nn.SiLU()]
            size = width
        last = nn.Linear(size, 1)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, observation: Mapping[str, Tensor], chunk: Tensor) -> Tensor:
        """``(B,)`` of normalised observations, images as the teacher's tokens, and chunks ``(B, T, A)``."""
        values: Tensor = self.layers(torch.cat([self.features(observation), chunk.flatten(1)], 1))
        return values.squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Adversarial(Direct):
    """A critic D(o, x) learns to tell the student's chunks x_K from the teacher's x_1, and the student to be
    taken for the teacher.

    Regression averages where the student cannot follow the map from x_0 to x_1; a critic sees that. The
    losses are the relativistic ones of pairs, with zero-centred penalties of the slope on both sides (Huang
    et al. 2024, "The GAN is dead; long live the GAN!", section 2: RpGAN + R1 + R2):

        critic:   E softplus(D(o, x_K) - D(o, x_1)) + g/2 E[ |dD/dx (o, x_1)|^2 + |dD/dx (o, x_K)|^2 ]
        student:  E softplus(D(o, x_1) - D(o, x_K)) + anchor E |x_K - x_1|^2

    They were chosen because they need no other device to be stable: near the solution the penalties make
    gradient descent converge, whether both networks step in turn or at once (Mescheder et al. 2018, theorem
    4.1); without the one on x_K the slope can grow where only the student's chunks are; and comparing pairs
    leaves the student no gain in dropping a mode. A pair is of one observation and one x_0. Here both step
    at once, so that one forward pass of the student serves both.

    TReFT (Li et al. 2025) reports that adversarial training of a one-step flow as it is hardly converges, and
    takes the velocity for the output, since near t = 1 it points from the origin to the data. Here x_0 + v
    is near the data because the student comes distilled (``init``), and it stays the Euler student that
    samplers, export and fine-tuning know. Real chunks are the teacher's and not the demonstrations', which
    have one chunk an observation, and may be worse than the teacher.

    Attributes:
        anchor: weight of the direct distillation.
        penalty: g, for chunks in normalised units.
        critic_rate: learning rate of the critic over that of the student.
    """

    name: ClassVar[str] = "adversarial"
    anchor: NonNegativeFloat = 10.0
    penalty: NonNegativeFloat = 0.1
    critic_rate: Annotated[float, positive_to(1000)] = 10.0

    @cached_property
    def critic(self) -> ChunkCritic:
        """With weights of torch's global seed when it is first asked for."""
        return ChunkCritic(self.teacher).to(self.teacher.device)

    @property
    def auxiliary(self) -> Auxiliary:
        """The critic; without momentum, as in both papers on its convergence."""
        return Auxiliary(self.critic, self.critic_rate, (0.0, 0.99))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The sum of both losses: neither network gets gradients of the other's."""
        chunk = self.sample(network, network.encode(batch.observation), draws.noise)
        distance = (chunk - batch.action).square().mean()
        bound = self.teacher.config.action_clip
        # In float32, as second derivatives ask for, and with gradients where there is a validation too.
        with torch.autocast(chunk.device.type, enabled=False), torch.enable_grad():
            with torch.no_grad():
                observation = encode_images(self.teacher.network, batch.observation)
            made, real = chunk.float().clamp(-bound, bound), batch.action.float()
            judged = [_with_slope(self.critic, observation, each.detach()) for each in (real, made)]
            (high, slope_high), (low, slope_low) = judged
            critic = softplus(low - high).mean() + self.penalty / 2 * (slope_high + slope_low).mean()
            fixed = {name: value.detach() for name, value in self.critic.named_parameters()}
            fooled: Tensor = functional_call(self.critic, fixed, (observation, made))
            student = softplus(high.detach() - fooled).mean()
        metrics = {
            "loss/direct": distance, "loss/student": student, "loss/critic": critic,
            "critic/margin": (high - low).mean(), "critic/slope": (slope_high + slope_low).mean() / 2,
        }  # fmt: skip
        return critic + student + self.anchor * distance, {
            key: each.detach() for key, each in metrics.items()
        }


def _with_slope(
    critic: ChunkCritic, observation: Mapping[str, Tensor], chunk: Tensor
) -> tuple[Tensor, Tensor]:
    """D ``(B,)`` and |dD/dx|^2 ``(B,)``, both with gradients for the critic."""
    chunk = chunk.requires_grad_(True)
    value = critic(observation, chunk)
    (slope,) = torch.autograd.grad(value.sum(), chunk, create_graph=True)
    return value, slope.square().sum((1, 2))

"""DiffusionNFT (Zheng et al. 2025) on action chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowpolicy.finetuning.rules.forward import ForwardRule, executed_sum
from flowpolicy.finetuning.rules.rule import Minibatch
from flowpolicy.flow.objective import Metrics
from flowpolicy.ranges import PositiveFloat

LEAST_WEIGHT = 1e-5


@dataclass(frozen=True)
class NFT(ForwardRule):
    """Good chunks pull the velocity towards themselves, bad ones pull its mirror image.

    With the behaviour velocity v_old and r = clip(A / (2 A_max) + 1/2, 0, 1),

        v+ = v_old + b (v - v_old),   v- = v_old - b (v - v_old),   x_1(v) = x_t + (1 - t) v,
        loss = r |x_1(v+) - x_1|^2 / w+ + (1 - r) |x_1(v-) - x_1|^2 / w-,

    means over the executed elements, w = mean |x_1(v) - x_1| without gradient. Where A = 0 the loss is lowest
    at v_old.

    Attributes:
        strength: b; the smaller, the farther v goes for the same advantages.
        largest_advantage: A_max, beyond which a chunk counts as wholly good or bad.
    """

    name: ClassVar[str] = "nft"
    strength: PositiveFloat = 0.5
    largest_advantage: PositiveFloat = 2.0

    def policy_loss(self, velocity: Tensor, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """See the class."""
        old, u, remaining = batch.kept["old"], batch.kept["u"], 1 - batch.kept["t"][..., None, None]
        good = (batch.advantage / (2 * self.largest_advantage) + 0.5).clamp(0, 1)[:, None]
        elements = (batch.chunk_mask.sum((1, 2)) * u.shape[-1]).clamp(min=1)[:, None]
        change = self.strength * (velocity - old)
        errors = []
        for mirrored in (old + change, old - change):
            distance = remaining * (mirrored - u)  # x_1(v) - x_1
            weight = executed_sum(distance.detach().abs(), batch) / elements
            square = executed_sum(distance**2, batch) / elements
            errors.append(square / weight.clamp(min=LEAST_WEIGHT))
        return (good * errors[0] + (1 - good) * errors[1]).mean(), {}

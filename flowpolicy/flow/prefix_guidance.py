"""Guidance by a prefix: a chunk that agrees with actions already committed to, without training for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.errors import FlowPolicyError
from flowpolicy.flow.guidance import GUIDANCES, Guidance, GuidedChunk, Transform
from flowpolicy.flow.network import Velocity
from flowpolicy.plugins import register
from flowpolicy.ranges import PositiveFloat

Target = tuple[Tensor, Tensor]  # normalised actions (B, T, A) and their weights (B, T)


def guidance_weight(t: float, beta: float, prior_std: float = 1.0) -> float:
    """min(beta, (1 - t) / (t r^2)), beta at t = 0; r^2 is the variance of x1 ~ N(0, s^2) given x_t.

    r^2 = s^2 (1 - t)^2 / (s^2 t^2 + (1 - t)^2), s being ``prior_std``. With s = 1 these are equations 2 and 4
    of Black, Galliker, Levine 2025, "Real-Time Execution of Action Chunking Flow Policies". Data of standard
    deviation s are led to their target exactly by this s.
    """
    if not 0 < t < 1:
        return beta
    variance = prior_std**2
    return min(beta, (variance * t**2 + (1 - t) ** 2) / (variance * t * (1 - t)))


def guided_velocity(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    t: float,
    target: Target,
    weight: float,
    step: float | None = None,
) -> Tensor:
    """The velocity at ``x`` ``(B, T, A)``, bent so that the flow ends near the target where it has weight.

    With x1 = x + (1 - t) v(x, t), the chunk that a straight line would reach, and the target's actions Y and
    weights W, it is v + weight * (Y - x1)^T diag(W) dx1/dx: one vector-Jacobian product, about the cost of a
    second evaluation. With ``step``, the length h of the Euler step, the weight of each row is bounded so
    that the step does not carry x1 beyond the target: see :func:`_largest_pull`.

    Source: Black et al. 2025 (arXiv 2506.07339), equations 2 and 3; the guidance is that of Song et al. 2023,
    "Pseudoinverse-Guided Diffusion Models for Inverse Problems", for flows after Pokle et al. 2023,
    "Training-free Linear Image Inverses via Flows".
    """
    actions, weights = target
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        reached = x + (1 - t) * v
    with torch.no_grad():
        error = (actions - reached) * weights[..., None]
    (pull,) = torch.autograd.grad(reached, x, error)
    if step is None:
        return v.detach() + weight * pull
    bound = _largest_pull(error, pull, weights[..., None], last=t + 1.5 * step > 1)
    return v.detach() + (bound / step).clamp(max=weight) * pull


def _largest_pull(error: Tensor, pull: Tensor, weights: Tensor, last: bool) -> Tensor:
    """The longest way along the pull that does not overshoot, row by row.

    With e the weighted error, J = dx1/dx and g = J^T e, moving x by a g moves x1 by about a J g. Along e that
    is a ``|g|^2 / |e|``, which uses up e where a = ``|e|^2 / |g|^2``. In the last step x1 itself is moved,
    by a g, and its weighted squared error is least at a = e.g / g.Wg.

    Returns:
        ``(B, 1, 1)``.
    """

    def total(values: Tensor) -> Tensor:
        return values.sum((1, 2), keepdim=True)

    used, needed = (
        (total(error * pull), total(weights * pull**2)) if last else (total(error**2), total(pull**2))
    )
    return used.clamp(min=0) / needed.clamp(min=torch.finfo(needed.dtype).tiny)


@register(GUIDANCES)
@dataclass(frozen=True)
class PrefixGuidance(Guidance):
    """Leads chunks to actions already committed to: ``act(..., prefix=(actions, weights))``.

    Actions are ``(B, T, A)`` in physical units, weights ``(B, T)`` in [0, 1]; a row whose weights are all 0,
    and a call without a prefix, is sampled freely. A guided step costs a forward and a backward pass. The
    chunk is also sampled freely, from the same x_0, and a row whose guided chunk is farther from its prefix
    than the free one is the free one: guidance does not leave a chunk worse off. Together that is three times
    the cost of a free chunk.

    The published settings suppose that normalised actions have a standard deviation of 1 given the
    observation. A policy that is surer of what it does has a smaller one, and is hardly moved by them:
    ``prior_std`` 0.2 and ``beta`` 4 K then hold it closer to its prefix. However large the weight, a step
    goes no farther than its target (:func:`guided_velocity`).

    Attributes:
        beta: largest guidance weight; 5 is the published one, for K = 5.
        prior_std: standard deviation of normalised actions given the observation; 1 is the published one.
    """

    name: ClassVar[str] = "prefix"
    options: ClassVar[tuple[str, ...]] = ("prefix",)
    solver: ClassVar[str | None] = "euler"  # how far a step may be pulled is known of its steps alone
    beta: PositiveFloat = 5.0
    prior_std: PositiveFloat = 1.0

    def bend(self, velocity: Velocity, chunk: GuidedChunk) -> Velocity:
        """See :func:`guided_velocity`."""
        target = self._target(chunk)
        return velocity if target is None else self._bent(velocity, target)

    def sample(self, integrate: Callable[[Transform | None], Tensor], chunk: GuidedChunk) -> Tensor:
        """Freely and guided; row by row the one that is nearer to its prefix.

        Raises:
            FlowPolicyError: a prefix of a wrong shape, with NaN, or with weights outside [0, 1].
        """
        target = self._target(chunk)
        free = integrate(None)
        if target is None:
            return free
        guided = integrate(lambda velocity: self._bent(velocity, target))
        distances = (_distance(chunk.normalize(chunk.finish(x)), target) for x in (guided, free))
        worse = next(distances) > next(distances)
        return torch.where(worse[:, None, None], free, guided)

    def _bent(self, velocity: Velocity, target: Target) -> Velocity:
        def bent(x: Tensor, t: float, h: float) -> Tensor:
            weight = guidance_weight(t, self.beta, self.prior_std)
            return guided_velocity(lambda x, t: velocity(x, t, h), x, t, target, weight, h)

        return bent

    def _target(self, chunk: GuidedChunk) -> Target | None:
        """The prefix checked and normalised; None where it weighs nothing."""
        given: Any = chunk.options.get("prefix")
        if given is None:
            return None
        device = chunk.noise.device
        actions, weights = (torch.as_tensor(part, dtype=torch.float32, device=device) for part in given)
        shape = tuple(chunk.finish(chunk.noise).shape)  # x_0 may have more numbers than a command
        if tuple(actions.shape) != shape or tuple(weights.shape) != shape[:2]:
            raise FlowPolicyError(
                f"The prefix has actions of shape {tuple(actions.shape)} and weights of shape "
                f"{tuple(weights.shape)}; they must be {shape} and {shape[:2]}."
            )
        if not torch.isfinite(actions).all() or not ((weights >= 0) & (weights <= 1)).all():
            raise FlowPolicyError("The prefix must hold finite actions, and weights between 0 and 1.")
        return (chunk.normalize(actions), weights) if weights.any() else None


def _distance(actions: Tensor, target: Target) -> Tensor:
    """Squared distance ``(B,)`` of normalised actions to the target's of weight 1; where a row has none, to
    all of them, weighted."""
    wanted, weights = target
    frozen = (weights == 1).to(weights.dtype)
    counted = torch.where(frozen.any(1, keepdim=True), frozen, weights)
    return (counted[..., None] * (actions - wanted) ** 2).sum((1, 2))

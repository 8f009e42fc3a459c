"""Sampling a chunk that agrees with actions already committed to, without training for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowpolicy.acceleration.sampler import POLICY_ATTRIBUTES
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.models.transformer import Context
from flowpolicy.policy import FlowPolicy, Observations
from flowpolicy.settings import require

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


class InpaintingSampler:
    """Samples chunks that agree with a prefix; without one it is the policy, whose place it can take.

    The observation is encoded once a chunk, and modulations are tabulated when it is built, from the weights
    of that moment. A guided step costs a forward and a backward pass. The chunk is also planned freely, from
    the same x_0, and a row whose guided chunk is farther from its prefix than the free one is the free one:
    guidance does not leave a chunk worse off. Together that is three times the cost of a free chunk.

    The published settings suppose that normalised actions have a standard deviation of 1 given the
    observation. A policy that is surer of what it does has a smaller one, and is hardly moved by them:
    ``prior_std`` 0.2 and ``beta`` 4 K then hold it closer to its prefix. However large the weight, a step
    goes no farther than its target (:func:`guided_velocity`).

    Args:
        policy: a flow-matching or shortcut policy; its network is copied.
        num_steps: K; the policy's default where None.
        solver: ``euler``, the only one that the guidance is defined for.
        beta: largest guidance weight; 5 is the published one, for K = 5.
        prior_std: standard deviation of normalised actions given the observation; 1 is the published one.

    Raises:
        ConfigError: another solver, a K that the policy does not have, or a number out of range.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        num_steps: int | None = None,
        solver: str = "euler",
        beta: float = 5.0,
        prior_std: float = 1.0,
    ) -> None:
        num_steps = policy.default_num_steps if num_steps is None else num_steps
        require(solver == "euler", "solver", solver, "euler: guidance by a prefix is defined for Euler steps")
        require(beta > 0, "beta", beta, "positive")
        require(prior_std > 0, "prior_std", prior_std, "positive")
        policy.check_steps(num_steps, solver)
        self.policy, self.num_steps, self.solver = policy, num_steps, solver
        self.beta, self.prior_std = beta, prior_std
        self._network = copy.deepcopy(policy.network).eval().requires_grad_(False)
        level = torch.full((1,), policy.objective.level_of(num_steps), device=policy.device)
        times = [k / num_steps for k in range(num_steps)]
        with torch.no_grad():
            self._modulations = {
                t: self._network.modulations(torch.full_like(level, t, dtype=torch.float32), level)
                for t in times
            }

    def __call__(self, observations: Observations, noise: Tensor | None = None) -> Tensor:
        """Action chunks ``(B, T, A)`` in physical units, planned freely."""
        return self.act(observations, noise=noise)

    def act(
        self,
        observations: Observations,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        prefix: tuple[Any, Any] | None = None,
        num_steps: int | None = None,
        solver: str | None = None,
    ) -> Tensor:
        """As :meth:`FlowPolicy.act`, and in agreement with a prefix.

        Args:
            observations: key -> ``(B, T_o, *shape)`` in physical units.
            noise: x_0 ``(B, T, A)``; drawn from ``generator`` where None.
            generator: source of x_0.
            prefix: actions ``(B, T, A)`` in physical units and weights ``(B, T)`` in [0, 1], tensors or
                arrays; a row whose weights are all 0 is planned freely.
            num_steps: K, only the one it was built for.
            solver: only ``euler``.

        Raises:
            ConfigError: a K or solver it was not built for.
            FlowPolicyError: an input of a wrong shape, with NaN, or weights outside [0, 1].
        """
        asked = (num_steps or self.num_steps, solver or self.solver)
        if asked != (self.num_steps, self.solver):
            raise ConfigError(
                f"This sampler was built for num_steps={self.num_steps}, solver={self.solver}; build another "
                f"one for num_steps={asked[0]}, solver={asked[1]}."
            )
        policy = self.policy
        # Gradients are needed even where the caller has switched them off, inference mode included.
        with torch.inference_mode(False), torch.no_grad():
            normalized = policy.normalize_observations(observations)
            rows = len(next(iter(normalized.values())))
            noise = policy.noise(rows, noise, generator).clone()
            target = None if prefix is None else self._target(prefix, rows)
            context = self._network.encode(normalized)
            free = policy.finish(self._integrate(context, noise, None))
            if target is None:
                return free
            guided = policy.finish(self._integrate(context, noise, target))
            worse = self._distance(guided, target) > self._distance(free, target)
            return torch.where(worse[:, None, None], free, guided)

    def nfe(self, num_steps: int | None = None, solver: str | None = None) -> int:
        """Network evaluations of a chunk planned freely; a guided one takes twice as many, and ``num_steps``
        backward passes."""
        return self.num_steps

    def _integrate(self, context: Context, noise: Tensor, target: Target | None) -> Tensor:
        def plain(x: Tensor, t: float) -> Tensor:
            return self._network.velocity(x, self._modulations[t], context)

        def guided(x: Tensor, t: float) -> Tensor:
            assert target is not None
            weight = guidance_weight(t, self.beta, self.prior_std)
            return guided_velocity(plain, x, t, target, weight, 1 / self.num_steps)

        return integrate(plain if target is None else guided, noise, self.num_steps, SOLVERS[self.solver])

    def _distance(self, chunk: Tensor, target: Target) -> Tensor:
        """Squared distance ``(B,)`` to the actions of weight 1, in normalised units; where a row has none, to
        all of them, weighted."""
        actions, weights = target
        frozen = (weights == 1).to(weights.dtype)
        counted = torch.where(frozen.any(1, keepdim=True), frozen, weights)
        error = self.policy.action_normalizer.normalize(chunk) - actions
        return (counted[..., None] * error**2).sum((1, 2))

    def _target(self, prefix: tuple[Any, Any], rows: int) -> Target | None:
        """The prefix checked and normalised; None where it weighs nothing."""
        policy, (given, weighed) = self.policy, prefix
        actions = torch.as_tensor(given, dtype=torch.float32, device=policy.device)
        weights = torch.as_tensor(weighed, dtype=torch.float32, device=policy.device)
        shape = (rows, policy.action_horizon, policy.action_dim)
        if tuple(actions.shape) != shape or tuple(weights.shape) != shape[:2]:
            raise FlowPolicyError(
                f"The prefix has actions of shape {tuple(actions.shape)} and weights of shape "
                f"{tuple(weights.shape)}; they must be {shape} and {shape[:2]}."
            )
        if not torch.isfinite(actions).all() or not ((weights >= 0) & (weights <= 1)).all():
            raise FlowPolicyError("The prefix must hold finite actions, and weights between 0 and 1.")
        if not weights.any():
            return None
        return policy.action_normalizer.normalize(actions), weights

    def __getattr__(self, name: str) -> Any:
        if name in POLICY_ATTRIBUTES:
            return getattr(self.policy, name)
        raise AttributeError(name)

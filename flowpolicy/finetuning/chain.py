"""The denoising chain and its exact likelihood (Zhang et al. 2025, ReinFlow, section 4).

    x_0 ~ N(0, I),   x_{k+1} ~ N(mu_k, K h_k diag sigma_k^2),   mu_k = x_k + h_k v(x_k, t_k, d, o)

where sigma_k is the noise network's, for a step of 1/K: on an uneven grid each unit of flow time has as much
variance. Everything is in normalised action units. Samples are never clamped inside the chain; the mean of
the last transition is held within the policy's ``action_clip``, as the deployed flow holds its chunk, which
leaves the density Gaussian. The environment bounds actions, outside the density.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowpolicy.features.presence import optional_keys
from flowpolicy.finetuning.noise import NoiseConfig, NoiseNetwork
from flowpolicy.flow.network import encode_images, tabulated, velocities
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.flow_policy import sample_chunk
from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.settings import require


class Chain(NamedTuple):
    """Sampled chains: ``x`` ``(B, K+1, T, A)``, ``mean`` and ``std`` ``(B, K, T, A)``."""

    x: Tensor
    mean: Tensor
    std: Tensor

    @property
    def chunk(self) -> Tensor:
        """x_K ``(B, T, A)``, which is executed."""
        return self.x[:, -1]


DEFAULT_STEPS = 4


def chain_steps(policy: FlowPolicy, asked: int | None) -> int:
    """K of a policy's chain: the one that is asked for, or else the one that it is tuned for, or 4."""
    tuned = policy.config.tuned
    return asked or (DEFAULT_STEPS if tuned is None else policy.sampling.steps)


class NoisyFlow(nn.Module):
    """A flow policy's network with a noise network beside it: a Markov chain with K Gaussian transitions.

    Args:
        policy: a flow-matching or shortcut policy; its network is used, not copied.
        num_steps: K.
        noise: settings of the noise network.
        grid: ``name`` and settings of the grid of flow times; None takes the one that the policy was
            tuned for, or else the uniform one.

    Raises:
        ConfigError: the policy is no flow, or cannot take K steps.
    """

    times: Tensor
    lengths: Tensor
    spreads: Tensor
    step_sizes: Tensor

    def __init__(
        self, policy: FlowPolicy, num_steps: int, noise: NoiseConfig, grid: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.objective = policy.objective
        policy.objective.require_flow()
        policy.require_unsteered("ReinFlow")
        policy.action_space.require_plain("Fine-tuning")
        lacking = ", ".join(optional_keys(policy.spec.features))
        allowed = "observed in every store that a policy to fine-tune was pretrained on"
        require(not lacking, "data.observation_keys", lacking, allowed)
        if grid is None and policy.config.tuned is None and policy.sampling.grid is not None:
            grid = {"name": "uniform"}  # the policy's own is for sampling without noise
        wanted = SamplerSpec(num_steps=num_steps, solver="euler", grid=grid)
        self.sampling = policy.checked(wanted, allow_any_steps=True)
        self.num_steps = num_steps
        self.clip = policy.config.action_clip
        self.network = policy.network
        features = ObservationFeatures(policy.network, policy.spec.features, policy.spec.obs_horizon)
        self.noise = NoiseNetwork(
            features, num_steps, policy.spec.action_horizon, policy.spec.action_dim, noise
        )
        # One grid of left end-points and steps for sampling, scoring and the deployed Euler sampler.
        times, lengths = zip(*self.sampling.grid_object.steps(num_steps), strict=True)
        sizes = [policy.objective.step_size(length) for length in lengths]
        # Such a network has learnt its steps from these points alone; between them its velocity is of no use.
        self.knows_only_its_chain = policy.config.tuned is not None or any(sizes)
        self.register_buffer("times", torch.tensor(times), persistent=False)
        self.register_buffer("lengths", torch.tensor(lengths), persistent=False)
        spreads = [math.sqrt(num_steps * length) for length in lengths]
        self.register_buffer("spreads", torch.tensor(spreads), persistent=False)
        self.register_buffer("step_sizes", torch.tensor(sizes), persistent=False)

    @torch.no_grad()
    def sample(
        self,
        observation: Mapping[str, Tensor],
        noise: Tensor,
        generator: torch.Generator | None = None,
        *,
        branches: bool = False,
        noisy: float = 1.0,
    ) -> Chain:
        """Sample chains that start at ``noise`` x_0 ``(B, T, A)``, for normalised observations.

        With ``branches`` one transition of each chain, drawn among the K, has its noise and the others end at
        their means. Of the rows the last ones have noise, a share ``noisy`` of them; the chunks of the others
        are the flow's own. ``std`` is that of all transitions.
        """
        observation = encode_images(self.network, observation)
        context = self.network.encode(observation)
        velocity_at = tabulated(self.network, *self._times_like(noise))
        x, chain, means, stds = noise, [noise], [], []
        has_noise = torch.arange(len(x), device=x.device)[:, None, None] >= round((1 - noisy) * len(x))
        if branches:
            chosen = torch.randint(self.num_steps, (len(x), 1, 1), generator=generator, device=x.device)
        for k in range(self.num_steps):
            mean = x + self.lengths[k].to(x.dtype) * velocity_at(k, x, context)
            if k == self.num_steps - 1:
                mean = mean.clamp(-self.clip, self.clip)
            std = self.noise(observation, x[:, None], torch.tensor([k], device=x.device))[:, 0]
            std = self.spreads[k].to(x.dtype) * std
            shocks = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = mean + std * shocks * (has_noise & (chosen == k) if branches else has_noise)
            chain.append(x)
            means.append(mean)
            stds.append(std)
        return Chain(torch.stack(chain, 1), torch.stack(means, 1), torch.stack(stds, 1))

    def forward(self, observation: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``(B, K, T, A)`` of recorded chains ``x`` ``(B, K+1, T, A)``.

        One batched forward pass over all K transitions, with the gradient of everything.
        """
        before = x[:, :-1]
        observation = encode_images(self.network, observation)
        context = self.network.encode(observation)
        velocity = velocities(self.network, before.transpose(0, 1), *self._times_like(x), context)
        mean = before + self.lengths.to(x.dtype)[:, None, None] * velocity.transpose(0, 1)
        final = mean[:, -1:].clamp(-self.clip, self.clip)
        std = self.noise(observation, before, torch.arange(self.num_steps, device=x.device))
        std = self.spreads.to(x.dtype)[:, None, None] * std
        return torch.cat([mean[:, :-1], final], 1), std

    @torch.no_grad()
    def sample_flow(self, observation: Mapping[str, Tensor], noise: Tensor) -> Chain:
        """The flow without injected noise as a chain of one transition, whose standard deviation is 0."""
        chunk = self.flow(observation, noise)
        return Chain(torch.stack([noise, chunk], 1), chunk[:, None], torch.zeros_like(chunk)[:, None])

    def flow(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """The chunk x_K ``(B, T, A)`` of the flow without noise, as deployed, with gradients."""
        return sample_chunk(self.network, self.objective, observation, noise, self.sampling, self.clip)

    def velocity(self, observation: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        """v ``(B, n, T, A)`` at n points of the path for each row, with the step size of the K steps.

        Args:
            observation: normalised, key -> ``(B, T_o, *shape)``, images perhaps as tokens.
            x: ``(B, n, T, A)``.
            t: ``(B, n)``.
        """
        context = self.network.encode(observation)
        points, d = zip(x.unbind(1), t.unbind(1), strict=True), self.step_sizes[:1].to(x.dtype)
        return torch.stack([self.network.velocity(each, at, d, context) for each, at in points], 1)

    def frozen_copy(self) -> NoisyFlow:
        """A copy that no longer learns."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def _times_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.times.to(x.dtype), self.step_sizes.to(x.dtype)


def transition_mask(executed: Tensor, num_steps: int, action_horizon: int) -> Tensor:
    """Which elements of a chain's density count, ``(B, K, T, 1)`` of 0 and 1.

    Of the last transition only the actions that the environment executed, which is exact: given x_{K-1} the
    actions are independent, and those that were not executed had no effect. Earlier transitions reach every
    action of the last and count in full. Where nothing was executed nothing counts.

    Args:
        executed: ``(B,)`` primitive steps that were executed of each chunk.
        num_steps: K.
        action_horizon: T.
    """
    last = torch.arange(action_horizon, device=executed.device) < executed[:, None]
    early = (executed > 0)[:, None, None].expand(-1, num_steps - 1, action_horizon)
    return torch.cat([early, last[:, None]], 1)[..., None]


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log N(x_{k+1}; mean_k, std_k^2) ``(B, K, T, A)``; the x_0 term has no parameters."""
    return -0.5 * ((x[:, 1:] - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def kl_divergence(mean: Tensor, std: Tensor, new_mean: Tensor, new_std: Tensor) -> Tensor:
    """Elementwise KL(N(mean, std^2) || N(new_mean, new_std^2)) in nats, closed form."""
    ratio = (std / new_std) ** 2
    return 0.5 * (ratio + ((mean - new_mean) / new_std) ** 2 - 1 - ratio.log())


def entropy(std: Tensor) -> Tensor:
    """Elementwise entropy of N(., std^2) in nats."""
    return std.log() + 0.5 * (1 + math.log(2 * math.pi))

"""Diffusion Policy's own transformer with a DDPM sampler, for benchmarks that set our samplers beside it.

Only imported from a checkout of real-stanford/diffusion_policy (MIT licence); it needs nothing but torch. The DDPM
update is written here, as Ho et al. 2020, equations 11 and 7, with the squared-cosine variances of the Push-T
configuration and clipped predictions, because `diffusers` spends longer on it: the peer is made faster, not slower.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TRAIN_STEPS = 100  # diffusion steps of the published configuration


def build_model(checkout: str | Path, *, width: int, depth: int, num_heads: int, horizon: int = 16,
                action_dim: int = 2, obs_dim: int = 20, obs_steps: int = 2) -> nn.Module:  # fmt: skip
    """`TransformerForDiffusion` as the published low-dimensional configuration makes it, at other sizes."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from diffusion_policy.model.diffusion.transformer_for_diffusion import TransformerForDiffusion

    model: nn.Module = TransformerForDiffusion(
        input_dim=action_dim, output_dim=action_dim, horizon=horizon, n_obs_steps=obs_steps, cond_dim=obs_dim,
        n_layer=depth, n_head=num_heads, n_emb=width, p_drop_emb=0.0, p_drop_attn=0.01, causal_attn=True,
        time_as_cond=True, obs_as_cond=True, n_cond_layers=0,
    )  # fmt: skip
    return model.eval()


def alphas_cumprod(steps: int = TRAIN_STEPS) -> Tensor:
    """Squared-cosine noise levels (Nichol and Dhariwal 2021, equation 17), ``(steps,)``."""

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / steps) / level(i / steps), 0.999) for i in range(steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0).float()


class DDPMSampler:
    """Ancestral sampling over all 100 steps, or over every tenth for K = 10.

    Args:
        model: predicts the noise from ``(sample, timestep, cond)``.
        num_steps: K, a divisor of 100.
    """

    def __init__(self, model: nn.Module, num_steps: int = TRAIN_STEPS) -> None:
        self.model, self.num_steps = model, num_steps
        levels = alphas_cumprod()
        stride = TRAIN_STEPS // num_steps
        steps = range(TRAIN_STEPS - stride, -1, -stride) if stride > 1 else range(TRAIN_STEPS - 1, -1, -1)
        self.table: list[tuple[Any, ...]] = []
        for t in steps:
            now, before = float(levels[t]), float(levels[t - stride]) if t >= stride else 1.0
            alpha = now / before
            x0_factor = math.sqrt(before) * (1 - alpha) / (1 - now)
            x_factor = math.sqrt(alpha) * (1 - before) / (1 - now)
            sigma = math.sqrt(max((1 - before) / (1 - now) * (1 - alpha), 0.0))
            self.table.append(
                (torch.tensor([t]), math.sqrt(now), math.sqrt(1 - now), x0_factor, x_factor, sigma)
            )

    @torch.no_grad()
    def __call__(self, cond: Tensor, noise: Tensor, injected: Tensor) -> Tensor:
        """Normalised chunks ``(B, T, A)``.

        Args:
            cond: normalised observations ``(B, T_o, D)``.
            noise: to start from, ``(B, T, A)``.
            injected: one more for each step, ``(K, B, T, A)``; the last one is not used.
        """
        x = noise
        for (t, root_now, root_rest, x0_factor, x_factor, sigma), drawn in zip(
            self.table, injected, strict=True
        ):
            predicted = ((x - root_rest * self.model(x, t, cond)) / root_now).clamp(-1, 1)
            x = x0_factor * predicted + x_factor * x
            if sigma > 0:
                x = x + sigma * drawn
        return x

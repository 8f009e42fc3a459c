"""A small random policy whose blocks all do something, and whose second token is a single action of three."""

from __future__ import annotations

import torch

from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig


def random_policy(objective="flow_matching", seed=0, depth=2, model=None, **settings):
    """Random weights (a fresh network is the zero velocity), and normalisers that do something."""
    torch.manual_seed(seed)
    model = model or TransformerConfig(width=16, depth=depth, num_heads=2, actions_per_token=3)
    config = PolicyConfig(
        {"name": objective}, model, {"observation": (3,), "goal": (2,)},
        action_dim=2, obs_horizon=2, action_horizon=4, execute_horizon=2, **settings,
    )  # fmt: skip
    policy = FlowPolicy(config).eval()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.normal_(0, 0.3)
    policy.fit_normalizers(
        {"observation": 3 * torch.randn(50, 3) + 1, "goal": torch.randn(50, 2)}, 2 * torch.randn(50, 2)
    )
    return policy


def random_observations(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation": torch.randn(rows, 2, 3, generator=generator),
        "goal": torch.randn(rows, 2, 2, generator=generator),
    }

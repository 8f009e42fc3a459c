"""Policies of one observation, and what every kind must keep."""

import numpy as np
import torch

from flowpolicy.acceleration.engine import random_observations
from flowpolicy.features import Feature
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

T_O, T, A = 2, 4, 2


def policy_of(features, data=None):
    """A tiny policy that takes these features, fitted to data, key -> ``(steps, *shape)``."""
    torch.manual_seed(0)
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    policy = FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, features, A, T_O, T, 2)).eval()
    with torch.no_grad():
        for parameter in policy.network.parameters():  # a fresh network is the zero velocity
            if not parameter.any():
                parameter.normal_(0, 0.3)
    if data is not None:
        policy.fit_normalizers({key: policy.spec.features[key].tensor(v, "cpu") for key, v in data.items()},
                               torch.randn(9, A))  # fmt: skip
    return policy


def check_kind(feature: Feature, data, tmp_path):
    """Warm-up and random values are taken, reach the chunk, and the checkpoint gives the kind back."""
    policy = policy_of({"thing": feature}, {"thing": data})
    noise = torch.randn(3, T, A)
    resting = {key: value[None].repeat(3, 0) for key, value in policy.spec.resting_observation().items()}
    random = random_observations(policy, 3, torch.Generator().manual_seed(0))
    policy.check_observations(random)
    assert not torch.allclose(policy.act(resting, noise=noise), policy.act(random, noise=noise))
    loaded = FlowPolicy.load(policy.save(tmp_path / "checkpoint"))
    assert loaded.spec.features == {"thing": feature}
    assert torch.equal(loaded.act(random, noise=noise), policy.act(random, noise=noise))
    given = {"thing": np.stack([data[:T_O], data[1 : T_O + 1], data[2 : T_O + 2]])}
    assert torch.isfinite(loaded.act(given, noise=noise)).all()
    return policy

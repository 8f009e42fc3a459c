"""Guidance by what a tuned policy prefers: nothing of it, as much, and more."""

import copy

import pytest
import torch
from toy_training import toy_trainer

from flowpolicy import CheckpointError, ConfigError
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.policy import RewardGuidance


@pytest.fixture(scope="module")
def policy():
    return toy_trainer("flow_matching", steps=1).policy.eval()


@pytest.fixture(scope="module")
def checkpoint(policy, tmp_path_factory):
    """A policy that has moved away from the first."""
    tuned, generator = copy.deepcopy(policy), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return tuned.save(tmp_path_factory.mktemp("tuned") / "checkpoint")


def test_without_weight_it_is_the_policy_and_with_weight_one_the_tuned_one(policy, checkpoint):
    generator = torch.Generator().manual_seed(1)
    observation, noise = (torch.randn(shape, generator=generator) for shape in ((5, 1, 3), (5, 4, 1)))
    tuned = type(policy).load(checkpoint)
    free, wanted = (each.act(observation, noise=noise) for each in (policy, tuned))
    for weight, expected in ((0.0, free), (1.0, wanted)):
        guidance = {"name": "reward", "checkpoint": str(checkpoint), "weight": weight}
        found = build_sampler(policy, guidance=guidance)(observation, noise)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(free, wanted, atol=1e-3)


def test_weight_w_makes_of_two_gaussians_the_first_tilted_by_w_times_their_log_ratio(checkpoint, policy):
    """N(0, s^2) (N(m, s^2) / N(0, s^2))^w is N(w m, s^2)."""
    variance, mean, weight = 0.25, 0.3, 2.5

    def to(mean):
        def velocity(x, t, h):
            slope = (variance * t - (1 - t)) / (variance * t**2 + (1 - t) ** 2)
            return mean + slope * (x - t * mean)

        return velocity

    guidance = RewardGuidance(checkpoint=str(checkpoint), weight=weight)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1)
    for t in (0.0, 0.3, 0.9):
        bent = guidance.mixed(to(0.0), to(mean))(x, t, 0.1)
        torch.testing.assert_close(bent, to(weight * mean)(x, t, 0.1))


def test_a_policy_that_means_other_actions_is_refused(policy, checkpoint):
    other = copy.deepcopy(policy)
    other.action_normalizer.scale.mul_(1.5)
    sampler = build_sampler(other, guidance={"name": "reward", "checkpoint": str(checkpoint)})
    with pytest.raises(ConfigError, match="take one that was fine-tuned from it"):
        sampler(torch.zeros(1, 1, 3))
    with pytest.raises(CheckpointError, match="No checkpoint at nowhere"):
        build_sampler(policy, guidance={"name": "reward", "checkpoint": "nowhere"})

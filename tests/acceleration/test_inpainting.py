"""Guidance by a prefix, against analytic flows, finite differences and the policy without it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_policy import random_policy

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.acceleration.engine import random_observations
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.execution.fusion import prefix_weights
from flowpolicy.execution.receding_horizon import RecedingHorizon
from flowpolicy.flow.prefix_guidance import guidance_weight, guided_velocity


def guided_sampler(policy, num_steps=None, solver=None, **settings):
    guidance = {"name": "prefix", **settings}
    return build_sampler(policy, num_steps=num_steps, solver=solver, backend="eager", guidance=guidance)


def half_prefix(rows, weight=1.0):
    weights = torch.zeros(rows, 4)
    weights[:, :2] = weight
    return torch.linspace(-2, 2, rows * 8).reshape(rows, 4, 2), weights


@pytest.mark.parametrize(("t", "expected"), [(0.0, 5.0), (0.05, 5.0), (0.2, 4.25), (0.5, 2.0), (1.0, 5.0)])
def test_the_guidance_weight_is_the_published_one(t, expected):
    assert guidance_weight(t, 5.0) == pytest.approx(expected)


@pytest.mark.parametrize("prior_std", [1.0, 0.3])
def test_guidance_of_gaussian_data_ends_exactly_at_the_target(prior_std):
    # v of x1 ~ N(m, s^2): E[x1 | x_t] is linear in x_t, so the last step of the guided flow lands on Y.
    mean, variance = 0.4, prior_std**2

    def velocity(x, t):
        gain = t * variance / (variance * t**2 + (1 - t) ** 2)
        return (mean + gain * (x - t * mean) - x) / (1 - t)

    noise = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target, weights = torch.full_like(noise, 0.7), torch.zeros(3, 4, dtype=torch.float64)
    weights[:, :2] = 1
    x, free, steps = noise, noise, 8
    for k in range(steps):
        t = k / steps
        x = (
            x
            + guided_velocity(
                velocity, x, t, (target, weights), guidance_weight(t, 1e9 if t else 5.0, prior_std)
            )
            / steps
        )
        free = free + velocity(free, t) / steps
    torch.testing.assert_close(x[:, :2], target[:, :2], rtol=0, atol=1e-9)
    assert torch.equal(x[:, 2:], free[:, 2:])
    assert (free[:, :2] - target[:, :2]).abs().min() > 1e-3


def test_the_pull_is_the_gradient_of_the_weighted_squared_error():
    policy = random_policy().double()
    network = policy.network.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    observation = {
        "observation": torch.randn(2, 2, 3, generator=generator).double(),
        "goal": torch.randn(2, 2, 2, generator=generator).double(),
    }
    context = network.encode(observation)
    t = 0.3

    def velocity(x, t):
        return network.velocity(x, x.new_full((1,), t), x.new_zeros(1), context)

    x, actions = (torch.randn(2, 4, 2, generator=generator).double() for _ in range(2))
    weights = torch.rand(2, 4, generator=generator).double()

    def loss(x):
        return 0.5 * (weights[..., None] * (actions - (x + (1 - t) * velocity(x, t))) ** 2).sum()

    pull = guided_velocity(velocity, x, t, (actions, weights), 1.0) - velocity(x, t)
    step, differences = 1e-5, torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = torch.zeros_like(x)
        moved[index] = step
        differences[index] = (loss(x - moved) - loss(x + moved)) / (2 * step)
    assert differences.abs().max() > 0.1
    torch.testing.assert_close(pull, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("objective", "num_steps"), [("flow_matching", 5), ("shortcut", 1), ("shortcut", 4)])
def test_without_a_prefix_it_is_the_policy_to_the_last_bit(objective, num_steps, observations, noise):
    policy = random_policy(objective)
    sampler = guided_sampler(policy, num_steps)
    expected = policy.act(observations, num_steps=num_steps, noise=noise)
    actions, weights = half_prefix(5)
    assert torch.equal(sampler.act(observations, noise=noise), expected)
    assert torch.equal(sampler.act(observations, noise=noise, prefix=(actions, 0 * weights)), expected)
    weights[1] = 0  # a free row among guided ones
    mixed = sampler.act(observations, noise=noise, prefix=(actions, weights))
    assert torch.equal(mixed[1], expected[1])
    assert ((mixed - expected).abs().amax((1, 2)) > 1e-3).tolist() == [True, False, True, True, True]


def test_a_trained_policy_keeps_to_the_prefix(repo_root):
    policy = FlowPolicy.load(repo_root / "benchmarks" / "checkpoints" / "pusht-flow_matching-seed0")
    generator = torch.Generator().manual_seed(0)
    observations = random_observations(policy, 30, generator)
    noises = torch.randn(2, 30, 16, 2, generator=generator)
    wanted, free = (policy.act(observations, noise=noise, num_steps=16) for noise in noises)
    weights = torch.zeros(30, 16)
    weights[:, :4] = 1

    def distance(chunk):
        difference = policy.action_normalizer.normalize(chunk) - policy.action_normalizer.normalize(wanted)
        return difference[:, :4].square().mean().sqrt()

    def guided(**settings):
        sampler = guided_sampler(policy, 16, **settings)
        return distance(sampler.act(observations, noise=noises[1], prefix=(wanted.numpy(), weights.numpy())))

    assert guided() < 0.7 * distance(free)
    assert guided(beta=64.0, prior_std=0.2) < 0.35 * distance(free)


CHECKPOINTS = Path(__file__).resolve().parents[2] / "benchmarks" / "checkpoints"


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*/")), ids=lambda path: path.name)
def test_guidance_leaves_no_shipped_policy_farther_from_what_was_committed_to(path):
    policy = FlowPolicy.load(path)
    horizon, rows = policy.spec.action_horizon, 6
    steps = [policy.sampling.num_steps] if policy.config.tuned else [1, 2, 4, 5, 8]
    for num_steps in steps:
        try:
            guidance = {"name": "prefix", "beta": 4.0 * num_steps, "prior_std": 0.2}
            settings = DeployedSampler(checkpoint=str(path), num_steps=num_steps, guidance=guidance)
            sampler = settings.build()
        except ConfigError:  # shortcut models have no K = 5
            assert num_steps == 5
            continue
        generator = torch.Generator().manual_seed(num_steps)
        observations = random_observations(policy, rows, generator)
        noises = torch.randn(2, rows, horizon, policy.spec.action_dim, generator=generator)
        wanted = sampler.act(observations, noise=noises[0])
        frozen = max(horizon // 4, 1)
        weights = torch.from_numpy(prefix_weights(horizon, frozen, max(horizon // 2, 1))).expand(rows, -1)
        normalize = policy.action_normalizer.normalize

        def distance(chunk, wanted=wanted, normalize=normalize, frozen=frozen):
            return (normalize(chunk) - normalize(wanted))[:, :frozen].square().mean((1, 2)).sqrt()

        free = distance(sampler.act(observations, noise=noises[1]))
        guided = distance(sampler.act(observations, noise=noises[1], prefix=(wanted, weights)))
        assert (guided <= free).all()
        if horizon > 1 and num_steps >= 4:
            assert guided.mean() < 0.6 * free.mean()


def test_a_step_of_guidance_goes_no_farther_than_its_target():
    # x1 = 2 x: the pull is 2 e, and moving x by half of e uses e up. In the last step x1 itself is moved.
    target = (torch.ones(1, 1, 1), torch.ones(1, 1))

    def velocity(x, t):
        return x / (1 - t)  # x1 = 2 x

    x = torch.zeros(1, 1, 1)
    assert guided_velocity(velocity, x, 0.0, target, 1e9, 0.25).item() == pytest.approx(0.25 / 0.25 * 2)
    assert guided_velocity(velocity, x, 0.75, target, 1e9, 0.25).item() == pytest.approx(1 / 0.25)
    assert guided_velocity(velocity, x, 0.5, target, 0.1, 0.25).item() == pytest.approx(0.2)


def test_gradients_are_had_where_the_caller_has_switched_them_off(policy, observations, noise):
    sampler, prefix = guided_sampler(policy, 4), half_prefix(5)
    expected = sampler.act(observations, noise=noise, prefix=prefix)
    with torch.inference_mode():
        inside = {key: value + 0 for key, value in observations.items()}
        found = sampler.act(inside, noise=noise + 0, prefix=tuple(part + 0 for part in prefix))
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(parameter.requires_grad for parameter in policy.network.parameters())


def test_it_takes_the_place_of_the_policy(policy, observations):
    sampler = guided_sampler(policy)
    assert sampler.nfe() == policy.sampling.num_steps
    batch = {key: value[:, -1].numpy() for key, value in observations.items()}
    chosen = []
    for runs in (policy, sampler):
        horizon = RecedingHorizon(runs, 5, 2)
        for slot in range(5):
            horizon.reset(slot, slot)
        chosen.append(horizon.actions(batch, range(5)))
    assert np.array_equal(*chosen)


def test_what_it_cannot_do_is_refused_in_one_sentence(policy, observations, noise):
    for wrong, said in (
        ({"beta": 0.0}, "beta"),
        ({"prior_std": -1.0}, "prior_std"),
    ):
        with pytest.raises(ConfigError, match=said):
            guided_sampler(policy, 4, **wrong)
    with pytest.raises(ConfigError, match="powers of two"):
        guided_sampler(random_policy("shortcut"), 3)
    sampler = guided_sampler(policy, 4)
    for wrong in ({"num_steps": 8}, {"solver": "heun"}):
        with pytest.raises(ConfigError, match="built for num_steps=4"):
            sampler.act(observations, noise=noise, **wrong)
    actions, weights = half_prefix(5)
    for prefix in ((actions[:, :2], weights), (actions, weights[:4])):
        with pytest.raises(FlowPolicyError, match=r"must be \(5, 4, 2\) and \(5, 4\)"):
            sampler.act(observations, noise=noise, prefix=prefix)
    for prefix in (
        (actions, weights * 2),
        (actions, weights * float("nan")),
        (actions * float("inf"), weights),
    ):
        with pytest.raises(FlowPolicyError, match="finite actions"):
            sampler.act(observations, noise=noise, prefix=prefix)
    with pytest.raises(AttributeError):
        sampler.no_such_thing  # noqa: B018

"""Losses and gradients against a computation by hand in float64, and what they do to a known distribution."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from toy_training import toy_trainer

from flowpolicy import ConfigError
from flowpolicy.data.sampling import Batch
from flowpolicy.flow.objective import Draws
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.preferences.losses import build_loss
from flowpolicy.preferences.losses.flow_dpo import FlowDPO
from flowpolicy.preferences.losses.flow_rwr import FlowRWR


@pytest.fixture(scope="module")
def policies():
    """A reference and a policy that has moved away from it, in float64."""
    reference = toy_trainer("flow_matching", steps=1).policy.double().eval()
    policy, generator = copy.deepcopy(reference), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*policy.network.parameters(), *reference.network.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return reference, policy


def toy_batch(rows=6):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(4) < torch.tensor([[4], [4], [2], [4], [1], [3]])
    batch = Batch({"observation": normal(rows, 1, 3)}, normal(rows, 4, 1), mask, reward=normal(rows))
    return batch, normal(rows // 2, 4, 1), torch.rand(rows // 2, generator=generator, dtype=torch.float64)


def by_hand(network, batch, noise, t):
    """sum over executed actions of (v(x_t) - (x_1 - x_0))^2, one row after another; and v."""
    errors, velocities = [], []
    for row in range(len(batch)):
        x_0, x_1, time = noise[row // 2], batch.action[row], t[row // 2]
        context = network.encode({"observation": batch.observation["observation"][row : row + 1]})
        x_t = x_0 + time * (x_1 - x_0)
        v = network.velocity(x_t[None], time[None], torch.zeros(1, dtype=torch.float64), context)[0]
        executed = int(batch.mask[row].sum())
        errors.append(((v - x_1 + x_0)[:executed] ** 2).sum())
        velocities.append(v[:executed])
    return errors, velocities


def gradients(scalar, network):
    return torch.autograd.grad(scalar, list(network.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", ["flow_dpo", "flow_rwr"])
def test_loss_and_gradient_are_those_by_hand(policies, name):
    reference, policy = policies
    batch, noise, t = toy_batch()
    given = {"flow_dpo": {"beta": 0.7, "pull": 0.3}, "flow_rwr": {"tau": 0.6}}[name]
    loss = build_loss({"name": name, **given}, reference)
    draws = Draws(*(part.repeat_interleave(2, 0) for part in (noise, t, torch.zeros_like(t))))
    value, metrics = loss.loss(policy.network, batch, draws)
    errors, v = by_hand(policy.network, batch, noise, t)
    with torch.no_grad():
        before, v_ref = by_hand(reference.network, batch, noise, t)
    if name == "flow_rwr":
        weights = [float(torch.exp(reward / 0.6)) for reward in batch.reward]
        moved = sum(((a - b) ** 2).sum() for a, b in zip(v, v_ref, strict=True))
        weighted = sum((6 * w / sum(weights) - 1) * e for w, e in zip(weights, errors, strict=True))
        expected = (weighted + moved) / (6 * 4)
        wanted = gradients(expected, policy.network)
    else:
        logits = [
            -0.35 * ((errors[i] - before[i]) - (errors[i + 1] - before[i + 1])).detach() for i in (0, 2, 4)
        ]
        moved = sum(((a - b) ** 2).sum() for a, b in zip(v, v_ref, strict=True)) / 6
        expected = sum(torch.log1p(torch.exp(-logit)) for logit in logits) / 3 + 0.3 * moved
        # d/dtheta -log sigmoid(s) = -sigmoid(-s) ds/dtheta, with s of a pair linear in its two errors
        shares = [torch.sigmoid(-logit) * 0.35 / 3 for logit in logits]
        surrogate = sum(share * (errors[2 * i] - errors[2 * i + 1]) for i, share in enumerate(shares))
        wanted = gradients(surrogate + 0.3 * moved, policy.network)
        assert float(metrics["loss/accuracy"]) == pytest.approx(sum(float(s) > 0 for s in logits) / 3)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0, check_dtype=False)
    for ours, theirs in zip(gradients(value, policy.network), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in reference.network.parameters())


class Gaussian(torch.nn.Module):
    """The exact velocity of the flow to N(mean, 0.5^2)."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))

    def encode(self, observation):
        return None

    def velocity(self, x, t, d, context):
        t = t[:, None, None]
        slope = (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2)
        return self.mean + slope * (x - t * self.mean)


@pytest.mark.parametrize(
    ("kind", "settings"), [(FlowDPO, {"beta": 1.0, "pull": 0.5}), (FlowRWR, {"tau": 1.0})]
)
def test_preferred_chunks_become_likelier_than_under_the_reference(kind, settings):
    """Of two chunks from N(0, 0.5^2) the larger is preferred."""
    network, fixed = Gaussian(), Gaussian()
    tuned = SimpleNamespace(tuned=None)
    objective = toy_trainer("flow_matching", steps=1).policy.objective
    reference = SimpleNamespace(
        network=fixed, objective=objective, config=tuned, sampling=SamplerSpec(num_steps=4, solver="euler")
    )
    loss = kind(reference=reference, **settings)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    everywhere = torch.ones(256, 1, dtype=torch.bool)
    reward = torch.tensor([1.0, -1.0]).repeat(128)
    for _ in range(60):
        pair = 0.5 * torch.randn((128, 2, 1), generator=generator)
        chunks = pair.sort(1, descending=True).values.view(256, 1, 1)
        draws = loss.draw((256, 1, 1), generator, "cpu")
        assert torch.equal(draws.noise[0::2], draws.noise[1::2])
        assert torch.equal(draws.t[0::2], draws.t[1::2])
        value, _ = loss.loss(network, Batch({}, chunks, everywhere, reward=reward), draws)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    after, before = (torch.distributions.Normal(each.mean.detach(), 0.5) for each in (network, fixed))
    gain = after.log_prob(chunks) - before.log_prob(chunks)
    assert after.mean > 0.05
    assert float(gain[0::2].mean()) > 0 > float(gain[1::2].mean())


def test_rewards_that_say_nothing_leave_the_policy_as_it_is(policies):
    """Whatever the chunks are, which weighted imitation would learn."""
    reference, _ = policies
    policy = copy.deepcopy(reference)
    batch, noise, t = toy_batch()
    batch = dataclasses.replace(batch, reward=torch.zeros(6, dtype=torch.float64))
    draws = Draws(*(part.repeat_interleave(2, 0) for part in (noise, t, torch.zeros_like(t))))
    value, _ = build_loss({"name": "flow_rwr"}, reference).loss(policy.network, batch, draws)
    for gradient in gradients(value, policy.network):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("policy", "times"), [("flow_matching", None), ("shortcut", {0.0, 0.25, 0.5, 0.75})])
def test_a_policy_that_takes_steps_learns_where_they_begin(policy, times):
    reference = toy_trainer(policy, steps=1).policy
    loss = build_loss({"name": "flow_dpo"}, reference)
    draws = loss.draw((400, 4, 1), torch.Generator().manual_seed(0), "cpu")
    assert (loss.tuned is None) == (times is None)
    assert len(set(draws.t.tolist())) == (200 if times is None else len(times))
    if times is not None:
        assert set(draws.t.tolist()) == times
        assert set(draws.d.tolist()) == {0.25}


def test_a_policy_that_is_no_flow_is_refused():
    with pytest.raises(ConfigError, match="has no flow to integrate"):
        build_loss({"name": "flow_dpo"}, toy_trainer("regression", steps=1).policy)

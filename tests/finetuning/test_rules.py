"""The update rules on the forward process against computations of their own, and in ReinFlow's loop."""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from toy_practice import Reach, grouped, make, make_policy

from flowpolicy import FlowPolicy
from flowpolicy.errors import CheckpointError
from flowpolicy.finetuning.advantages import GAE
from flowpolicy.finetuning.chain import NoisyFlow, transition_mask
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import AWM, GDRO, NFT, UPDATE_RULES, Minibatch
from flowpolicy.finetuning.rules.forward import SPREAD
from flowpolicy.finetuning.run import finetune
from flowpolicy.flow.sampler_spec import SamplerSpec

B, T, A = 5, 4, 2
PULLED = AWM(injects_noise=False, pull=0.01)


class Toy(torch.nn.Module):
    """v = a x + b t + c o."""

    knows_only_its_chain = False
    num_steps, times = 4, torch.tensor([0.0, 0.3, 0.5, 0.8])

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def velocity(self, observation, x, t):
        a, b, c = self.theta
        return a * x + b * t[..., None, None] + c * observation["o"][:, None, None]


def minibatch(chunk, advantage, executed):
    """Executed chunks as a rule gets them; where they came from is nothing that it may look at."""
    x = torch.full((len(chunk), 3, *chunk.shape[1:]), math.nan, dtype=chunk.dtype)
    mask = transition_mask(executed, 2, chunk.shape[1])
    observation = {"o": torch.linspace(-1, 1, len(chunk), dtype=chunk.dtype)[:, None]}
    return Minibatch(observation, x, x[:, 1:], x[:, 1:], mask, advantage, advantage, executed=chunk)


def nft(rule, v, frozen, draws, x_1, advantage):
    """The published equations, a number at a time; ``frozen`` are the velocities in the weights."""
    r, total = min(max(advantage / (2 * rule.largest_advantage) + 0.5, 0), 1), 0.0
    for (t, x_0, old), new, weighed in zip(draws, v, frozen, strict=True):
        for share, sign in ((r, 1), (1 - r, -1)):

            def ends(velocity, t=t, x_0=x_0, old=old, sign=sign):
                mixed = (1 - sign * rule.strength) * old + sign * rule.strength * velocity
                return (1 - t) * x_0 + t * x_1 + (1 - t) * mixed

            w = np.mean(np.abs(ends(weighed) - x_1))
            total += share * np.mean((ends(new) - x_1) ** 2) / w
    return total / len(draws)


def awm(rule, v, frozen, draws, x_1, advantage):
    gains = [
        ((old - x_1 + x_0) ** 2).sum() - ((new - x_1 + x_0) ** 2).sum()
        for (_, x_0, old), new in zip(draws, v, strict=True)
    ]
    ratio = min(math.exp(np.mean(gains)), rule.largest_ratio)
    clipped = min(max(ratio, 1 - rule.clip_range), 1 + rule.clip_range)
    return -min(ratio * advantage, clipped * advantage)


@pytest.mark.parametrize("pull", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [
        (NFT(strength=0.7), nft),
        (AWM(clip_range=0.4), awm),
        (AWM(clip_range=0.01, largest_ratio=1.02, draws=3), awm),
    ],
)
def test_loss_and_gradient_are_those_of_a_computation_by_hand(rule, by_hand, pull):
    rule, generator = replace(rule, pull=pull), torch.Generator().manual_seed(0)
    theta, old, pretrained = (0.3, -0.2, 0.5), (0.35, -0.1, 0.4), (0.1, 0.2, 0.3)
    chunk = torch.randn(B, T, A, generator=generator, dtype=torch.float64)
    executed = torch.tensor([4, 3, 2, 1, 4])
    batch = minibatch(chunk, torch.tensor([-3.0, -0.5, 0.4, 1.0, 2.5], dtype=torch.float64), executed)
    kept = rule.prepare(Toy(old), batch, Toy(pretrained) if pull else None, generator)
    assert kept["t"].shape == (B, rule.draws)
    flow = Toy(theta)
    loss, metrics = rule.loss(flow, replace(batch, kept=kept))
    loss.backward()

    def value(theta, frozen=theta):
        total = moved = 0.0
        for i in range(B):
            rows = slice(int(executed[i]))
            o, x_1 = float(batch.observation["o"][i]), chunk[i, rows].numpy()
            times, starts = kept["t"][i].tolist(), [x_1 - u[rows].numpy() for u in kept["u"][i]]

            def at(parameters, o=o, x_1=x_1, times=times, starts=starts):
                a, b, c = parameters
                return [
                    a * ((1 - t) * x_0 + t * x_1) + b * t + c * o
                    for t, x_0 in zip(times, starts, strict=True)
                ]

            draws = list(zip(times, starts, at(old), strict=True))
            total += by_hand(rule, at(theta), at(frozen), draws, x_1, float(batch.advantage[i])) / B
            apart = [((new - far) ** 2).sum() for new, far in zip(at(theta), at(pretrained), strict=True)]
            total += pull * np.mean(apart) / B
            moved += np.mean([((new - o) ** 2).sum() for new, o in zip(at(theta), at(old), strict=True)]) / B
        return total, moved

    assert float(loss.detach()) == pytest.approx(value(theta)[0], rel=1e-12)
    assert float(metrics["train/kl"]) == pytest.approx(value(theta)[1] / 0.18, rel=1e-12)
    for i, step in enumerate(np.eye(3) * 1e-6):
        slope = (value(theta + step, theta)[0] - value(theta - step, theta)[0]) / 2e-6
        assert float(flow.theta.grad[i]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("t", "x_t"), [(0.1, 0.7), (0.5, -0.4), (0.9, 1.1)])
def test_the_first_step_on_a_gaussian_goes_where_its_better_chunks_are(t, x_t):
    """Chunks N(m, s^2) with A = a (x_1 - m): policies that weigh them by exp(A) are N(m + a s^2, s^2), whose
    velocity at x_t differs by a s^2 (1 - t) / ((1 - t)^2 + t^2 s^2).
    """
    m, s, slope, count = 0.3, 0.6, 0.1, 20_001
    spread = (1 - t) ** 2 + (t * s) ** 2
    mean, variance = m + t * s**2 / spread * (x_t - t * m), (s * (1 - t)) ** 2 / spread
    posterior = NormalDist(mean, variance**0.5)
    x_1 = torch.tensor([posterior.inv_cdf((i + 0.5) / count) for i in range(count)], dtype=torch.float64)
    chunk, times = x_1[:, None, None], torch.full((count, 1), t, dtype=torch.float64)
    batch = minibatch(chunk, slope * (x_1 - m), torch.ones(count, dtype=torch.long))
    velocity = torch.full_like(chunk[:, None], (mean - x_t) / (1 - t))
    kept = {"t": times, "u": (chunk[:, None] - x_t) / (1 - t), "old": velocity}
    tilted = slope * s**2 * (1 - t) / spread
    for rule, expected in (
        (AWM(), -2 * tilted),
        # The weight of an error is 1 / abs(error): the mean of abs(x_1 - mean) stands for that of its square.
        (NFT(strength=0.5, largest_advantage=2.0), -(slope / 2) * (1 - t) * (2 * variance / math.pi) ** 0.5),
    ):
        moving = velocity.clone().requires_grad_()
        rule.policy_loss(moving, replace(batch, kept=kept))[0].backward()
        assert float(moving.grad.sum()) == pytest.approx(expected, rel=2e-3)
    drawn = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))  # in groups of four
    moving = velocity[drawn].requires_grad_()
    groups = replace(replace(batch, kept=kept)[drawn], group_size=4)
    GDRO(strength=1.0, temperature=1.0).policy_loss(moving, groups)[0].backward()
    assert float(moving.grad.sum()) == pytest.approx(-2 * tilted * 3 / 4, rel=0.03)


@pytest.mark.parametrize("rule", [NFT(), AWM(), GDRO()])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_a_velocity_beyond_the_bounds_is_brought_back_and_driven_no_farther(rule, advantage):
    """What is executed is the bound, however far beyond it x_1(v) is."""
    chunk, advantages = torch.ones(8, 1, 1, dtype=torch.float64), torch.tensor([advantage, 0.0] * 4)
    batch = minibatch(chunk, advantages.double(), torch.ones(8, dtype=torch.long))
    batch = replace(batch, group_size=4 if rule.needs_groups else 1, observation={"o": chunk[:, :, 0]})
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for bounds in (None, torch.tensor([[-1.0], [1.0]], dtype=torch.float64)):
        old, flow = Toy((0.0, 0.0, 9.0)), Toy((0.0, 0.0, 9.001))  # v = 9.001: beyond, wherever x_t is
        bounded = replace(batch, bounds=bounds)
        kept = rule.prepare(old, bounded, None, generator)
        loss, metrics = rule.loss(flow, replace(bounded, kept=kept))
        loss.backward()
        gradients.append(float(flow.theta.grad[2]))
    assert metrics["train/kl"] == 0  # nothing is executed otherwise than before
    left = 1 - kept["t"]
    beyond = (kept["x_t"][..., 0, 0] + left * 9.001 - 1).numpy(), left.numpy()
    assert beyond[0].min() > 0
    assert gradients[1] == pytest.approx(2 * rule.overshoot * np.mean(beyond[0] * beyond[1]))  # inwards
    if advantage < 0 and not rule.needs_groups:
        assert gradients[0] < 0  # without bounds a bad chunk drives it on


@pytest.mark.parametrize(
    ("objective", "rule"),
    [("flow_matching", NFT()), ("shortcut", PULLED), ("flow_matching", NFT(injects_noise=True))],
)
def test_they_improve_a_policy(objective, rule):
    env, judged_on = (make_vec_env(Reach, n_envs=n, seed=0) for n in (16, 20))
    model = make(
        env, make_policy(objective=objective), update=rule, n_steps=16, batch_size=64, n_epochs=4,
        learning_rate=4e-3, gamma=0.9, target_kl=0.05,
    )  # fmt: skip
    before, _ = evaluate_policy(model, judged_on, n_eval_episodes=40, warn=False)
    noise = [parameter.clone() for parameter in model.actor_critic.flow.noise.parameters()]
    model.learn(5_000)
    after, _ = evaluate_policy(model, judged_on, n_eval_episodes=40, warn=False)
    assert after > before + 0.7, (before, after)  # of 10 at most
    for parameter, earlier in zip(model.actor_critic.flow.noise.parameters(), noise, strict=True):
        assert torch.equal(parameter, earlier)  # it is not learnt


@pytest.mark.parametrize("name", sorted(UPDATE_RULES))
def test_a_one_step_student_stays_one(name):
    tuned = SamplerSpec(num_steps=1, solver="euler", grid={"name": "uniform"})
    student = make_policy(objective="flow_matching", tuned=tuned)
    before = [parameter.clone() for parameter in student.network.parameters()]
    rule = UPDATE_RULES[name]()
    env = grouped() if rule.needs_groups else None
    model = make(env, student, num_steps=None, update=rule)
    model.learn(1)
    assert model.settings["num_steps"] == model.actor_critic.flow.num_steps == 1
    deployed = model.deployed_policy()
    assert any(
        not torch.equal(one, other) for one, other in zip(before, deployed.network.parameters(), strict=True)
    )
    assert deployed.config.tuned.integrates_like(tuned)
    assert deployed.act(torch.zeros(1, 1, 2)).shape == (1, 4, 2)


@pytest.mark.parametrize(("objective", "quiet"), [("flow_matching", 2), ("shortcut", 0)])
def test_a_share_of_the_environments_acts_as_deployed_where_that_teaches(objective, quiet):
    model = make(policy=make_policy(objective=objective), update=NFT(injects_noise=0.5))
    chain = model.actor_critic.sample({"observation": torch.zeros(4, 1, 2)}, None)
    assert (chain.x[:, 1:] == chain.mean).flatten(1).all(1).sum() == quiet


@pytest.mark.parametrize("kind", ["tuned", "shortcut", "mean_flow"])
def test_draws_of_a_policy_that_knows_only_its_chain_are_the_points_of_that(kind):
    tuned = SamplerSpec(num_steps=2, solver="euler", grid={"name": "shifted", "shift": 0.5})
    policy = (
        make_policy(objective="flow_matching", tuned=tuned)
        if kind == "tuned"
        else make_policy(objective=kind)
    )
    flow = NoisyFlow(policy, 2, NoiseConfig())
    observation, start = {"observation": torch.zeros(3, 1, 2)}, torch.randn(3, T, A)
    chain = flow.sample(observation, start)
    mask = transition_mask(torch.full((3,), T), 2, T)
    batch = Minibatch(observation, chain.x, chain.mean, chain.std, mask, torch.ones(3), torch.ones(3))
    kept = NFT().prepare(flow, batch, None, torch.Generator())
    assert torch.equal(kept["t"][0], flow.times)
    ends = kept["x_t"] + flow.lengths[:, None, None] * kept["u"]  # of the steps, but for the last's clamp
    torch.testing.assert_close(ends[:, 0], chain.x[:, 1])
    torch.testing.assert_close(
        kept["u"] - kept["old"], (chain.x[:, 1:] - chain.mean) / flow.lengths[:, None, None]
    )


@dataclass(frozen=True)
class Own(AWM):
    """A rule of a user's own."""

    name: ClassVar[str] = "own"


@pytest.fixture
def registered():
    UPDATE_RULES[Own.name] = Own
    yield
    del UPDATE_RULES[Own.name]


def test_its_draws_and_velocities_are_those_of_the_behaviour_policy():
    model = make(update=PULLED, n_epochs=2, learning_rate=0.0)
    seen, step = [], model.learner.policy_step
    model.learner.policy_step = lambda batch: seen.append((batch, step(batch))) or seen[-1][1]
    model.learn(1)
    for batch, (metrics, _) in seen:
        assert abs(metrics["train/kl"]) < 1e-6  # of a policy that does not move
        assert metrics["train/pull"] == pytest.approx(0.0, abs=1e-6)
        assert batch.chunk.abs().max() <= 1.0 + 1e-6  # as executed, within the bounds
        assert batch.x.shape[1] == 2
        assert not batch.std.any()
        times = batch.kept["t"]
        assert (times == torch.tensor([0.0, 0.0, 0.5, 0.5])).all()  # where the two steps are taken, as often


class Double(Reach):
    """Takes actions in double precision."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float64)


def test_bounds_of_another_precision_leave_that_of_the_chunks():
    model = make(env=make_vec_env(Double, n_envs=4, seed=0), update=PULLED)
    assert model.actor_critic.executed(torch.full((1, 4, 2), 9.0)).dtype == torch.float32
    model.learn(1)


def test_a_user_gets_the_actions_that_it_learns_from():
    model, chunks = make(update=PULLED), []
    for deterministic in (False, True):
        torch.manual_seed(0)
        chunks.append(model.predict(np.zeros((3, 2), np.float32), deterministic=deterministic)[0])
    np.testing.assert_array_equal(*chunks)


def test_the_reference_that_a_user_gave_stays_where_it_is(monkeypatch):
    moved, reference = [], make_policy()
    monkeypatch.setattr(NoisyFlow, "to", lambda flow, device: moved.append(flow) or flow)
    make(update=PULLED, reference=reference)
    assert moved
    assert all(flow.network is not reference.network for flow in moved)


@pytest.mark.usefixtures("empty_figures")
def test_it_may_be_named_in_a_run_whose_state_is_loaded_with_the_pretrained_policy(registered, tmp_path):
    make_policy().save(tmp_path / "pretrained")
    settings = {
        "env": {"name": "reach", "env_id": "toy_practice:toy/Reach-v0"}, "video": False,
        "checkpoint": str(tmp_path / "pretrained"), "num_steps": 2, "total_steps": 400, "num_envs": 4,
        "workers": 0, "final_episodes": 2, "evaluation_envs": 2, "update": {"name": "own", "pull": 0.1},
        "reinflow": {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "critic_warmup": 0},
    }  # fmt: skip
    finetune({**settings, "total_steps": 100}, tmp_path / "run")
    state = tmp_path / "run" / "training_state.zip"
    with pytest.raises(CheckpointError, match="reference="):
        ReinFlow.load(state)
    loaded = ReinFlow.load(state, reference=FlowPolicy.load(tmp_path / "run" / "base"))
    assert loaded.update == Own(pull=0.1)


class GroupMean:
    """Chunks of G neighbouring environments, compared among themselves."""

    gamma = 0.9

    def __call__(self, experience):
        reached = experience.rewards + np.where(
            experience.terminated, 0.0, self.gamma**experience.executed * experience.next_values
        )
        groups = reached.reshape(len(reached), -1, 2)
        return (groups - groups.mean(2, keepdims=True)).reshape(reached.shape), reached


def test_advantages_may_come_from_groups(tmp_path):
    model = make(advantages=GroupMean(), update=PULLED)
    model.learn(1)
    advantage = model.rollout_buffer.data(
        model.actor_critic.values, model.collector.after, model.scale, model.advantages
    ).advantage.reshape(-1, 2)
    torch.testing.assert_close(advantage.sum(1), torch.zeros(len(advantage)), rtol=0, atol=1e-5)
    model.save(tmp_path / "model")
    given = {"update": PULLED, "reference": make_policy()}
    with pytest.raises(CheckpointError, match="advantages of its user's own"):
        ReinFlow.load(tmp_path / "model", **given)
    assert ReinFlow.load(tmp_path / "model", advantages=GAE(0.9, 0.9), **given).num_timesteps > 0


def test_implicit_rewards_are_nats_by_default():
    assert GDRO().strength == pytest.approx(1 / (2 * SPREAD**2), rel=0.01)


def test_loss_and_gradient_of_groups_are_those_of_a_computation_by_hand():
    rule, generator = GDRO(strength=0.7, temperature=0.8, pull=0.3), torch.Generator().manual_seed(0)
    theta, old, pretrained = (0.3, -0.2, 0.5), (0.35, -0.1, 0.4), (0.1, 0.2, 0.3)
    chunk = torch.randn(6, T, A, generator=generator, dtype=torch.float64)
    executed, advantage = [4, 3, 2, 1, 4, 4], np.array([-3.0, -0.5, 0.4, 1.0, 2.5, 0.1])
    batch = replace(minibatch(chunk, torch.tensor(advantage), torch.tensor(executed)), group_size=3)
    kept = rule.prepare(Toy(old), batch, Toy(pretrained), generator)
    flow = Toy(theta)
    loss, _ = rule.loss(flow, replace(batch, kept=kept))
    loss.backward()
    t, x_0 = kept["t"].numpy(), (chunk[:, None] - kept["u"]).numpy()
    for drawn in (t, x_0):
        np.testing.assert_allclose(drawn.reshape(2, 3, *drawn.shape[1:]), drawn[::3, None].repeat(3, 1))

    def squares(parameters, target=None):
        """|v - u|^2, or |v - v'|^2, a mean over the draws, of each chunk."""
        found = []
        for i, rows in enumerate(map(slice, executed)):
            o, x_1, total = float(batch.observation["o"][i]), chunk[i, rows].numpy(), 0.0
            for at, start in zip(t[i], x_0[i, :, rows], strict=True):
                (a, b, c), x_t = parameters, (1 - at) * start + at * x_1
                aim = x_1 - start if target is None else target[0] * x_t + target[1] * at + target[2] * o
                total += ((a * x_t + b * at + c * o - aim) ** 2).sum() / len(t[i])
            found.append(total)
        return np.array(found)

    def value(theta):
        total = rule.pull * squares(theta, pretrained).mean()
        implicit = -0.7 * (squares(theta) - squares(old))
        for group in (slice(0, 3), slice(3, 6)):
            p, q = (
                np.exp(score) / np.exp(score).sum() for score in (advantage[group] / 0.8, implicit[group])
            )
            total -= (p * np.log(q)).sum() / 2
        return total

    assert float(loss.detach()) == pytest.approx(value(theta), rel=1e-12)
    for i, step in enumerate(np.eye(3) * 1e-6):
        slope = (value(theta + step) - value(theta - step)) / 2e-6
        assert float(flow.theta.grad[i]) == pytest.approx(slope, rel=1e-6, abs=1e-9)

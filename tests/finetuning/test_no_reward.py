"""Without rewards fine-tuning leaves the policy alone; with few it changes it little."""

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.vec_env import DummyVecEnv
from toy_practice import Reach, make, make_policy

from flowpolicy.finetuning.advantages import ReturnScale
from flowpolicy.finetuning.chain import NoisyFlow, kl_divergence
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import Wasserstein
from flowpolicy.finetuning.rules import PPO


class Constant(Reach):
    """Always the same reward but at step ``success_at`` (counted over all episodes), where it is 1."""

    def __init__(self, reward=0.0, ends=False, success_at=None):
        super().__init__()
        self.reward, self.ends, self.success_at = reward, ends, success_at

    def step(self, action):
        observation, _, _, truncated, info = super().step(action)
        fell = self.ends and bool(action[0] > 0.3)
        reward = self.reward if self.total != self.success_at else 1.0
        return observation, reward, fell, truncated, info


def constant(**settings):
    """Four environments, of which the first alone may succeed."""
    first, others = settings, {key: value for key, value in settings.items() if key != "success_at"}
    return DummyVecEnv([lambda: Constant(**first), *[lambda: Constant(**others)] * 3])


def parameters_of(model):
    return [parameter.detach().clone() for parameter in model.actor_critic.actor_parameters()]


def has_moved(model, before):
    pairs = zip(before, model.actor_critic.actor_parameters(), strict=True)
    return any(not torch.equal(earlier, parameter) for earlier, parameter in pairs)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("env", [{}, {"reward": -1.0}, {"ends": True}])
def test_where_no_return_differs_not_a_bit_of_the_policy_changes(env, extras):
    terms = {}
    if extras:
        reference = NoisyFlow(make_policy(), 2, NoiseConfig()).frozen_copy()
        terms = {"regularizers": (Wasserstein(reference, 1.0),), "update": PPO(entropy_coefficient=0.1)}
    model = make(constant(**env), **terms)
    before = parameters_of(model)
    critic = [parameter.detach().clone() for parameter in model.actor_critic.critic.parameters()]
    model.learn(1000)
    assert model.iteration >= 4
    assert not has_moved(model, before)
    # The critic may learn that there is nothing to expect.
    later = model.actor_critic.critic.parameters()
    assert any(not torch.equal(one, other) for one, other in zip(critic, later, strict=True))


def test_a_reward_for_every_step_that_a_fall_ends_does_tell():
    model = make(constant(reward=1.0, ends=True))
    before = parameters_of(model)
    model.learn(1)
    assert has_moved(model, before)


def test_one_success_after_many_iterations_without_moves_the_policy_once_and_little():
    success = 1000
    model = make(constant(success_at=success), n_steps=128, batch_size=128, n_epochs=2)
    start, steps = model.actor_critic.flow.frozen_copy(), []
    train = model.train

    def watched():
        before = parameters_of(model)
        train()
        steps.append((model.num_timesteps, has_moved(model, before)))

    model.train = watched
    model.learn(4 * success + 3000)
    moved = [index for index, (_, is_moved) in enumerate(steps) if is_moved]
    assert len(moved) == 1
    assert steps[moved[0]][0] >= 4 * success
    assert len(steps) > moved[0] + 2
    assert model.scale.value == pytest.approx(0.1)
    start.noise.log_bounds.copy_(model.actor_critic.flow.noise.log_bounds)  # these follow a schedule
    observation = {"observation": torch.rand(256, 1, 2)}
    chain = start.sample(observation, torch.randn(256, 4, 2))
    with torch.no_grad():
        nats = kl_divergence(chain.mean, chain.std, *model.actor_critic.flow(observation, chain.x))
    kl = float(nats.sum((1, 2, 3)).mean())
    assert 0 < kl < model.learner.target_kl / 30


def test_advantages_that_are_small_or_few_are_weak():
    model = make()
    many = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    few = torch.zeros(2048)
    few[:10] = 1.0
    one_in_200 = 25 * 10 / 2048
    cases = ((many, 1.0), (10 * many, 1.0), (1e-4 * many, 0.02**2), (few, one_in_200))
    for values, expected in cases:
        normalized, strength = model.learner.normalized(values + 3.0)
        assert float(normalized.mean()) == pytest.approx(0.0, abs=1e-4)
        assert float(normalized.std()) == pytest.approx(min(1.0, float(values.std()) / 0.005), rel=0.01)
        assert strength == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("zeros", "ends"), [(10, True), (1_600_000, True), (1_600_000, False)])
def test_no_scaled_return_is_beyond_ten(zeros, ends):
    scale = ReturnScale(1, 0.995)
    scale.merge(zeros, 0.0, 0.0)
    assert scale.value == 1.0  # nothing but zeros has no scale
    rewards = np.zeros((50, 1, 4))
    rewards[0, 0, 3] = 1.0
    episode_ends = np.zeros((50, 1), bool)
    episode_ends[0, 0] = ends
    scale.merge(*scale.run(rewards, np.full((50, 1), 4), episode_ends))
    assert 1.0 / scale.value <= 10.0

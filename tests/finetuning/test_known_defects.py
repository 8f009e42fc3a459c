"""Mistakes known from published implementations of ReinFlow that are not already excluded by another test.

The others: the two time grids and the ratio in test_chain.py and ../flow/test_solvers.py, the shared noise of
the regulariser in test_regularization.py, the step sizes of a shortcut model in ../flow/test_shortcut.py.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.utils import LinearSchedule
from toy_practice import make

from flowpolicy.finetuning.chain import log_prob
from flowpolicy.plots.learning import plot_finetuning


def test_an_epoch_holds_every_chunk_once():
    model = make(n_epochs=1, n_steps=16, batch_size=20)  # of which 64 is no multiple
    seen = []
    step = model.learner.critic_step
    model.learner.critic_step = lambda batch: seen.append(batch.x) or step(batch)
    model.learn(1)
    rows = torch.cat(seen).flatten(1)
    assert len(rows) == 16 * 4
    assert len(torch.unique(rows, dim=0)) == 16 * 4


def test_a_chain_far_from_its_mean_still_has_a_gradient():
    mean = torch.zeros(1, 1, 1, 1, requires_grad=True)
    chain = torch.tensor([0.0, 50.0]).view(1, 2, 1, 1)  # 50 standard deviations away
    log_prob(chain, mean, torch.ones(1, 1, 1, 1)).sum().backward()
    assert mean.grad.item() == pytest.approx(50.0)


def test_actions_are_bounded_for_the_environment_and_not_in_the_density():
    model = make()
    sent = []
    step = model.chunks.step
    model.chunks.step = lambda chunks: sent.append(chunks) or step(chunks)
    model.learn(1)
    chains = torch.stack([chain.x[:, -1] for chain in model.rollout_buffer._chains]).numpy()
    np.testing.assert_allclose(np.stack(sent), chains, rtol=1e-6)  # what is scored is what was sent,
    assert (np.abs(chains) > 1).any()  # beyond the bounds of the action space too


def test_a_time_limit_is_bootstrapped_from_the_observation_that_it_cut_off():
    model = make(gae_lambda=0.0, gamma=0.9)
    model.learn(1)
    buffer, critic = model.rollout_buffer, model.actor_critic.critic

    def value(observation):  # of the target, which a reset changes
        return 10 * observation["observation"][:, -1, 0]

    critic.forward = value
    data = buffer.data(critic, model.collector.after, model.scale, model.advantages)
    returns = data.returns.reshape(len(buffer), 4).numpy()
    for number, step in enumerate(buffer._steps):
        before = buffer._observations[number]["observation"].numpy()
        for row in np.flatnonzero(step.truncated):
            # The target of an episode stays, so the cut-off observation is the one that the chunk began with.
            bootstrap = 10 * before[row, -1, 0]
            rewards = step.rewards[row, :2] / model.scale.value  # the third chunk of ten steps has two
            expected = rewards[0] + 0.9 * rewards[1] + 0.9**2 * bootstrap
            assert returns[number, row] == pytest.approx(expected, rel=1e-4)
            assert before[row, -1, 0] != step.observation["observation"][row, -1, 0]  # a reset came after
    assert sum(step.truncated.sum() for step in buffer._steps) == 20


@pytest.mark.usefixtures("empty_figures")
def test_the_learning_rate_follows_progress_and_nothing_else(tmp_path):
    model = make(learning_rate=LinearSchedule(1e-3, 0.0, 1.0), adaptive_rate=False)
    seen = []
    train = model.train

    def watched():
        train()
        seen.append((model._current_progress_remaining, model.learner.actor_optimizer.param_groups[0]["lr"]))
        model.lr_schedule(0.5)  # asked for, as a plot of the schedule does
        if len(seen) == 1:
            plot_finetuning([{"step": 1.0, "rollout/return": 1.0}], tmp_path / "curves.png")

    model.train = watched
    model.learn(1_000)
    assert len(seen) > 3
    for left, rate in seen:
        assert rate == pytest.approx(1e-3 * max(left, 0.0), abs=1e-12)


def test_an_episode_that_crosses_iterations_is_counted_whole():
    model = make(n_steps=2, batch_size=8)  # eight steps of ten
    model.learn(400)
    assert model.iteration > 5
    assert {episode["l"] for episode in model.ep_info_buffer} == {10}
    assert all(0 < episode["r"] < 10 for episode in model.ep_info_buffer)
    whole = model.num_timesteps // 10
    assert whole - 4 <= len(model.ep_info_buffer) <= whole  # none is dropped but the four under way

"""Groups of chunks from one state: their advantages, side branches, and learning from them."""

import copy
import functools
import itertools
import os
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from toy_practice import CloneableReach, Open, Reach, Unsendable, Unwilling, grouped, make, make_policy

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.finetuning.advantages import GAE, Experience
from flowpolicy.finetuning.branching import BranchingChunks
from flowpolicy.finetuning.environments import LocalChunks
from flowpolicy.finetuning.group_advantages import GroupAdvantages
from flowpolicy.finetuning.parallel_environments import WorkerChunks
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import GDRO
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv
from flowpolicy.finetuning.staggered import CutFirstEpisode
from flowpolicy.models.config import MLPConfig

GAMMA = 0.9


def test_on_a_bandit_their_expectation_is_the_true_advantage():
    """Three chunks that end an episode at once, or lead to a state of known value; every group of three, as
    often as it is drawn. What the critic says of the bandit itself has no part in it."""
    chance, reward = np.array([0.2, 0.5, 0.3]), np.array([1.0, -0.5, 2.0])
    executed, is_end, value = np.array([4, 2, 3]), np.array([False, True, False]), np.array([3.0, 99.0, -1.0])
    worth = reward + np.where(is_end, 0.0, GAMMA**executed * value)
    drawn = np.array([*itertools.product(range(3), repeat=3)])
    weight, of = chance[drawn].prod(1), drawn.reshape(1, -1)
    experience = Experience(
        reward[of], executed[of], is_end[of], np.ones_like(of, bool), np.full(of.shape, 7.0), value[of]
    )
    advantages, returns = (
        rows.reshape(-1, 3)
        for rows in GroupAdvantages(GAMMA, 0.95, group_size=3, branch_length=1)(experience)
    )
    for number in range(3):
        share = weight[:, None] * (drawn == number)
        found = (share * advantages).sum() / share.sum()
        assert found == pytest.approx(worth[number] - chance @ worth, abs=1e-12)
    assert (weight[:, None] * returns).sum() / 3 == pytest.approx(chance @ worth, abs=1e-12)


def test_later_chunks_are_compared_place_by_place_and_end_with_their_branch():
    rng = np.random.default_rng(0)
    rewards, values, following = rng.normal(size=(3, 4, 4))
    executed, never = rng.integers(1, 5, (4, 4)), np.zeros((4, 4), bool)
    ended = np.array([[False] * 4, [False, True] * 2] * 2)
    found, returns = GroupAdvantages(GAMMA, 0.5, group_size=2, branch_length=2)(
        Experience(rewards, executed, never, ended, values, following)
    )
    errors = rewards + GAMMA**executed * following - values
    for first in (0, 2):
        later = errors[first + 1]
        early = errors[first] + GAMMA ** executed[first] * 0.5 * later
        for place, estimate in ((first, early), (first + 1, later)):
            apart = estimate[0::2] - estimate[1::2]
            np.testing.assert_allclose(found[place], np.stack([apart, -apart], 1).reshape(-1))
    expected, _ = GAE(GAMMA, 0.5)(Experience(rewards, executed, never, ended, values, following))
    np.testing.assert_allclose(returns, expected + values)


@pytest.mark.parametrize("workers", [0, 2, 3])  # of three, the second has the first of no group
def test_side_branches_are_in_no_episode_and_go_back_after_each_chunk(workers):
    chunks = BranchingChunks(grouped(4, workers).chunks, 2, 1)
    first = chunks.reset(0)["observation"]
    np.testing.assert_array_equal(first[[1, 3]], first[[0, 2]])
    actions = np.zeros((4, 4, 2), np.float32)
    steps = [chunks.step(actions) for _ in range(3)]  # of ten steps an episode
    for step in steps:
        np.testing.assert_array_equal(
            step.observation["observation"][[1, 3]], step.observation["observation"][[0, 2]]
        )
        np.testing.assert_array_equal(step.rewards[[1, 3]], step.rewards[[0, 2]])
        assert step.restarted.tolist() == [False, True] * 2
        assert step.executed.tolist() == [4 if step is not steps[2] else 2] * 4
    assert steps[1].truncated.tolist() == [False, True] * 2
    assert steps[2].truncated.all()
    assert [episode.length for episode in chunks.pop_episodes()] == [10, 10]
    chunks.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_wrappers_count_is_part_of_a_state(workers):
    """The second environment's first episode has 3 steps, the third's 6, and all others 8."""
    limited = [functools.partial(TimeLimit, CloneableReach(), 8)] + [
        functools.partial(CutFirstEpisode, TimeLimit(CloneableReach(), 8), length) for length in (3, 6, 8)
    ]
    keys = ("observation",)
    if workers:
        chunks = WorkerChunks(limited, workers, keys, 1)
    else:
        chunks = LocalChunks([make() for make in limited], keys, 1)
    chunks.reset(0)
    chunks.step(np.zeros((4, 2, 2)))
    seen = chunks.reset_to(chunks.states().rows([1, 2]), [3, 2])["observation"]
    np.testing.assert_array_equal(seen[3], seen[1])
    step = chunks.step(np.zeros((4, 4, 2)))
    assert step.executed.tolist() == [4, 1, 4, 1]
    assert step.truncated.tolist() == [False, True, True, True]
    np.testing.assert_array_equal(step.final_observation["observation"], seen)  # the target stays
    assert (step.observation["observation"][3] != step.observation["observation"][1]).any()
    with pytest.raises(FlowPolicyError, match=r"2 states for 4 environments; .*states\.rows"):
        chunks.reset_to(chunks.states().rows([1, 2]))
    with pytest.raises(FlowPolicyError, match=r"those of one count left, _elapsed_steps, .* _elapsed_steps"):
        chunks.reset_to(chunks.states().rows([1]), [0])
    chunks.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_cannot_be_put_to_a_state_after_all_is_named(workers):
    makers, keys = [CloneableReach, Unwilling], ("observation",)
    chunks = (
        WorkerChunks(makers, 2, keys, 1) if workers else LocalChunks([make() for make in makers], keys, 1)
    )
    with pytest.raises(FlowPolicyError, match=r"call reset\(\)"):
        chunks.states()
    first = chunks.reset(0)
    with pytest.raises(FlowPolicyError, match="Environment 1 raised ValueError: not now"):
        chunks.reset_to(chunks.states().rows([0]), [1])
    with pytest.raises(FlowPolicyError, match=r"call reset\(\)"):
        chunks.step(np.zeros((2, 4, 2)))
    np.testing.assert_array_equal(chunks.reset(0)["observation"], first["observation"])
    chunks.close()


def test_a_process_that_dies_within_a_branch_is_replaced():
    chunks = BranchingChunks(grouped(4, workers=2).chunks, 2, 2)
    chunks.reset(0)
    os.kill(chunks.chunks.pids[1], signal.SIGKILL)
    step = chunks.step(np.zeros((4, 4, 2)))
    assert step.executed.tolist() == [4, 4, 0, 0]
    assert step.restarted.tolist() == step.truncated.tolist() == [False, False, True, True]
    for _ in range(2):
        step = chunks.step(np.zeros((4, 4, 2)))
    assert [episode.length for episode in chunks.pop_episodes()] == [10]  # of the first, which lives
    seen = step.observation["observation"]
    np.testing.assert_array_equal(seen[3], seen[2])
    assert (seen[2] != seen[0]).any()
    chunks.close()


def test_a_state_that_cannot_be_sent_is_said_to_be():
    chunks = WorkerChunks([Unsendable] * 2, 2, ("observation",), 1)
    chunks.reset(0)
    with pytest.raises(FlowPolicyError, match="pickle"):
        chunks.states()
    chunks.close()


def test_a_wrapper_that_hands_on_names_is_not_taken_for_its_environment():
    with pytest.raises(ConfigError, match="there is a Open around it"):
        make(DummyVecEnv([lambda: Open(CloneableReach())] * 4), advantages=GroupAdvantages())


def test_a_process_that_dies_before_it_says_where_it_stands_is_one_sentence():
    chunks = grouped(4, workers=2).chunks
    first = chunks.reset(0)
    os.kill(chunks.pids[1], signal.SIGKILL)
    with pytest.raises(FlowPolicyError, match="process of environments 2 to 3 died; call reset"):
        chunks.states()
    np.testing.assert_array_equal(chunks.reset(0)["observation"][:2], first["observation"][:2])
    chunks.close()


def test_what_cannot_be_put_to_a_state_is_refused():
    lacking = r"native chunks \(env\.native\), or .* clone_state\(\) and restore_state\(\), and "
    for env, why in (
        (make_vec_env(Reach, 4), "there is a Monitor around it that does not"),
        (DummyVecEnv([Reach] * 4), "Reach does not have both"),
        (ChunkedVecEnv.in_processes([Reach] * 4, 2), "Reach does not have both"),
        (SubprocVecEnv([Reach] * 4), "a SubprocVecEnv keeps it out of reach; take ChunkedVecEnv"),
    ):
        with pytest.raises(ConfigError, match=lacking + why):
            make(env, advantages=GroupAdvantages())
        env.close()
    with pytest.raises(ConfigError, match="num_envs is 4; it must be a multiple of the 3"):
        make(grouped(), advantages=GroupAdvantages(group_size=3))
    with pytest.raises(ConfigError, match="n_steps is 16; it must be a multiple of the 3 chunks"):
        make(grouped(), advantages=GroupAdvantages(branch_length=3))
    with pytest.raises(ConfigError, match="update=gdro compares the chunks"):
        make(grouped(), update=GDRO(), advantages=GAE())


def test_offline_it_learns_at_the_end_from_chunks_of_the_pretrained_policy(tmp_path):
    pretrained = make_policy(objective="flow_matching", model=MLPConfig(hidden=16))
    model = make(
        grouped(16), copy.deepcopy(pretrained), update=GDRO(strength=1.0, temperature=0.3),
        advantages=GroupAdvantages(0.9, 0.9, 4, 3), n_steps=9, batch_size=48, n_epochs=12,
        learning_rate=1e-2, target_kl=1e-6, critic_warmup=99,
    )  # fmt: skip
    acted, sample = [], model.actor_critic.sample

    def watched(observation, generator):
        weights = model.actor_critic.flow_policy.state_dict()
        acted.append(all(torch.equal(weights[name], kept) for name, kept in pretrained.state_dict().items()))
        return sample(observation, generator)

    model.actor_critic.sample = watched
    judged_on = make_vec_env(Reach, n_envs=20, seed=0)
    before, _ = evaluate_policy(model, judged_on, n_eval_episodes=40, warn=False)
    model.learn(1_500)
    after, _ = evaluate_policy(model, judged_on, n_eval_episodes=40, warn=False)
    assert after > before + 0.4, (before, after)  # of 10 at most
    assert len(acted) == 9 * model.iteration > 9
    assert all(acted)
    assert len(model.rollout_buffer) == len(acted)
    model.save(tmp_path / "model")
    loaded = ReinFlow.load(tmp_path / "model", grouped(16))
    assert (loaded.update, loaded.advantages) == (model.update, model.advantages)
    assert loaded.scale.value == model.scale.value
    assert ReinFlow.load(tmp_path / "model").num_timesteps == model.num_timesteps

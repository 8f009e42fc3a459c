"""Advantages of chunks against a plain recursion, and the return scale against all values at once."""

import numpy as np
import pytest

from flowpolicy.finetuning.advantages import GAE, Experience, ReturnScale, chunk_rewards, moments_of

GAMMA, LAMBDA = 0.9, 0.8


def chunk_advantages(*columns_gamma_and_lambda):
    *columns, gamma, gae_lambda = columns_gamma_and_lambda
    return GAE(gamma, gae_lambda)(Experience(*columns))[0]


def episode(executed, terminated, rng):
    """One environment's chunks as ``(S, 1)`` arrays."""
    count = len(executed)
    rewards = rng.normal(size=(count, 1, 4)) * (np.arange(4) < np.array(executed)[:, None, None])
    return rewards, np.array(executed)[:, None], np.array(terminated)[:, None]


def test_with_lambda_one_the_advantage_is_the_discounted_return_minus_the_value():
    rng = np.random.default_rng(0)
    rewards, executed, terminated = episode([4, 4, 2], [False, False, True], rng)
    values = rng.normal(size=(3, 1))
    advantages = chunk_advantages(
        chunk_rewards(rewards, GAMMA), executed, terminated, terminated, values,
        np.concatenate([values[1:], [[99.0]]]), GAMMA, 1.0,
    )  # fmt: skip
    flat = np.concatenate([rewards[0, 0], rewards[1, 0], rewards[2, 0, :2]])
    for chunk, start in enumerate((0, 4, 8)):
        tail = flat[start:]
        expected = (tail * GAMMA ** np.arange(len(tail))).sum() - values[chunk, 0]
        assert advantages[chunk, 0] == pytest.approx(expected)


def test_a_time_limit_bootstraps_from_its_own_last_observation_and_a_terminal_state_does_not():
    rewards, executed = np.zeros((2, 1)), np.full((2, 1), 3)
    values, following = np.array([[1.0], [2.0]]), np.array([[5.0], [7.0]])
    ended, never = np.array([[True], [False]]), np.zeros((2, 1), bool)
    limit = chunk_advantages(rewards, executed, never, ended, values, following, GAMMA, LAMBDA)
    assert limit[:, 0] == pytest.approx([GAMMA**3 * 5 - 1, GAMMA**3 * 7 - 2])
    terminal = chunk_advantages(rewards, executed, ended, ended, values, following, GAMMA, LAMBDA)
    assert terminal[0, 0] == -1.0


def test_lambda_counts_chunks_and_gamma_counts_steps():
    rewards, executed = np.array([[0.0], [1.0]]), np.array([[2], [4]])
    zeros, never = np.zeros((2, 1)), np.zeros((2, 1), bool)
    advantages = chunk_advantages(rewards, executed, never, never, zeros, zeros, GAMMA, LAMBDA)
    assert advantages[:, 0] == pytest.approx([GAMMA**2 * LAMBDA, 1.0])


def test_a_chunk_that_was_not_executed_has_no_advantage():
    one, yes = np.array([[3.0]]), np.ones((1, 1), bool)
    found = chunk_advantages(np.zeros((1, 1)), np.zeros((1, 1), int), ~yes, yes, one, one, GAMMA, LAMBDA)
    assert found[0, 0] == 0.0


def test_the_return_scale_runs_on_across_iterations_and_restarts_with_episodes():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(10, 2, 4))
    executed = rng.integers(1, 5, size=(10, 2))
    rewards *= np.arange(4) < executed[..., None]
    ended = rng.random((10, 2)) < 0.3
    scale = ReturnScale(2, GAMMA)
    scale.merge(*scale.run(rewards[:4], executed[:4], ended[:4]))
    scale.merge(*scale.run(rewards[4:4], executed[4:4], ended[4:4]))  # nothing new: the same chunks again
    scale.merge(*scale.run(rewards[4:], executed[4:], ended[4:]))
    seen = []
    for env in range(2):
        running = 0.0
        for chunk in range(10):
            for reward in rewards[chunk, env, : executed[chunk, env]]:
                running = GAMMA * running + reward
                seen.append(running)
            if ended[chunk, env]:
                running = 0.0
    assert scale.value == pytest.approx(np.std(seen), rel=1e-6)
    assert scale.count == len(seen)


def test_merged_moments_are_those_of_all_values():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=1000)
    scale = ReturnScale(1, GAMMA)
    for part in np.split(values, [10, 300]):
        scale.merge(*moments_of(part))
    assert scale.mean == pytest.approx(values.mean())
    assert scale.value == pytest.approx(values.std(), rel=1e-6)

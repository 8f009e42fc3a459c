import csv
from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from toys import ToyEnv, ToyPolicy, load_toy, toy_task

from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.evaluation.parallel import evaluate_checkpoint
from flowpolicy.evaluation.result import concatenate
from flowpolicy.evaluation.rollout import check_spaces, evaluate
from flowpolicy.execution.receding_horizon import RecedingHorizon
from flowpolicy.features import Image, features_of


def _by_hand(seed: int) -> tuple[float, int, bool]:
    """One episode, written out plainly."""
    env, policy = ToyEnv(), ToyPolicy()
    runner = RecedingHorizon(policy, 1, 3)
    runner.reset(0, seed)
    observation, _ = env.reset(seed=seed)
    total, success, ended, length = 0.0, False, False, 0
    while not ended:
        action = runner.actions({"observation": observation[None].astype(np.float32)}, [0])[0]
        observation, reward, terminated, truncated, info = env.step(action.clip(-2, 2))
        total, success, length = total + reward, success or info["success"], length + 1
        ended = terminated or truncated
    return total, length, success


@pytest.mark.parametrize("num_envs", [1, 4, 50])
def test_every_episode_is_whole_and_independent_of_its_neighbours(num_envs):
    result = evaluate(ToyPolicy(), toy_task(), episodes=11, seed=30, num_envs=num_envs)
    expected = [_by_hand(30 + episode) for episode in range(11)]
    np.testing.assert_array_equal(result.returns, [total for total, _, _ in expected])
    np.testing.assert_array_equal(result.lengths, [length for _, length, _ in expected])
    np.testing.assert_array_equal(result.success, [success for _, _, success in expected])
    np.testing.assert_array_equal(result.score, -1.0)  # the largest, not the last
    np.testing.assert_array_equal(result.seeds, np.arange(30, 41))
    assert result.chunks == sum(-(-length // 3) for _, length, _ in expected)


def test_slots_are_replanned_together_although_episodes_end_at_different_steps():
    policy = ToyPolicy()
    result = evaluate(policy, toy_task(), episodes=12, num_envs=4)
    sampled = policy.batches[: len(policy.batches)]
    rounds = [size for size in sampled if size == 4]
    assert sum(rounds) >= 0.6 * result.chunks


def test_different_seeds_are_different_episodes_and_zero_noise_is_another_policy():
    kwargs = {"episodes": 5, "num_envs": 5}
    base = evaluate(ToyPolicy(), toy_task(), seed=0, **kwargs)
    assert not np.array_equal(base.returns, evaluate(ToyPolicy(), toy_task(), seed=9, **kwargs).returns)
    assert not np.array_equal(
        base.returns, evaluate(ToyPolicy(), toy_task(), seed=0, zero_noise=True, **kwargs).returns
    )


def test_metrics_agree_with_the_arrays(tmp_path):
    result = evaluate(ToyPolicy(), toy_task(), episodes=20, num_steps=2)
    found = result.metrics()
    assert found["return_mean"] == pytest.approx(result.returns.mean())
    assert found["return_ci95"][0] < found["return_mean"] < found["return_ci95"][1]
    assert found["success_rate"] == pytest.approx(result.success.mean())
    assert found["success_ci95"][0] < found["success_rate"] < found["success_ci95"][1]
    assert (found["episodes"], found["nfe"], found["score_mean"]) == (20, 2, -1.0)
    assert found["ms_per_chunk"] > 0
    assert found["simulation_seconds"] > 0
    assert result.scalars()["evaluation/return_low"] == found["return_ci95"][0]
    with result.write_csv(tmp_path / "episodes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["return"]) for row in rows] == result.returns.tolist()


def test_a_task_without_success_or_score_says_none():
    task = toy_task(name="pendulum", env_id="InvertedPendulum-v5", execute_horizon=4)
    policy = ToyPolicy()
    policy.spec = replace(policy.spec, features=features_of({"observation": (4,)}), action_dim=1)
    policy.act = lambda observations, *, noise, **_: noise  # type: ignore[method-assign]
    found = evaluate(policy, task, episodes=3, num_envs=2).metrics()
    assert found["success_rate"] is None
    assert found["success_ci95"] is None
    assert found["score_mean"] is None
    assert found["return_mean"] > 0


def test_dictionary_observations_and_a_chunk_shorter_than_the_episode():
    task = toy_task(env_kwargs={"dict_observation": True})
    plain = evaluate(ToyPolicy(), toy_task(), episodes=3)
    np.testing.assert_array_equal(evaluate(ToyPolicy("pose"), task, episodes=3).returns, plain.returns)


def test_spaces_that_do_not_fit_are_refused():
    policy = ToyPolicy()
    policy.spec = replace(policy.spec, action_dim=3)
    with pytest.raises(TaskError, match="vectors of 3"):
        evaluate(policy, toy_task(), episodes=1)
    policy = ToyPolicy()
    policy.spec = replace(policy.spec, features=features_of({"observation": (5,)}))
    with pytest.raises(TaskError, match=r"\(3,\).*\(5,\)"):
        evaluate(policy, toy_task(), episodes=1)
    with pytest.raises(TaskError, match="no observation 'pose'"):
        evaluate(ToyPolicy("pose"), toy_task(), episodes=1)
    with pytest.raises(TaskError, match="toy"):
        evaluate(ToyPolicy(), toy_task(env_id="NoSuchThing-v9"), episodes=1)


def test_an_environment_whose_images_are_floats_is_refused():
    policy, box = ToyPolicy(), gymnasium.spaces.Box(0, 1, (8, 8, 3), np.float32)
    policy.spec = replace(policy.spec, features={"observation": Image((8, 8, 3))})
    env = SimpleNamespace(observation_space=box, action_space=ToyEnv().action_space)
    with pytest.raises(TaskError, match="Task 'x': observation 'observation' is an image of float32; give"):
        check_spaces(env, policy, "Task 'x'")


def test_refused_steps_and_numbers():
    with pytest.raises(ConfigError, match="power of two"):
        evaluate(ToyPolicy(), toy_task(), episodes=1, num_steps=3)
    with pytest.raises(ConfigError, match="episodes is 0"):
        evaluate(ToyPolicy(), toy_task(), episodes=0)
    with pytest.raises(FlowPolicyError, match="NaN"):
        evaluate(ToyPolicy(fault=float("nan")), toy_task(), episodes=1)


def test_environments_are_closed_even_when_the_run_fails(monkeypatch):
    closed = []
    monkeypatch.setattr(ToyEnv, "close", lambda self: closed.append(self))
    with pytest.raises(FlowPolicyError):
        evaluate(ToyPolicy(fault=float("nan")), toy_task(), episodes=4, num_envs=3)
    assert len(closed) == 3


def test_parts_join_to_the_whole():
    whole = evaluate(ToyPolicy(), toy_task(), episodes=7, seed=100)
    parts = [
        evaluate(ToyPolicy(), toy_task(), episodes=count, seed=seed) for count, seed in ((3, 100), (4, 103))
    ]
    joined = concatenate(parts)
    for name in ("seeds", "returns", "lengths", "success", "score"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert joined.chunks == whole.chunks


@pytest.mark.slow
def test_worker_processes_find_what_one_process_finds(tmp_path):
    task = toy_task()
    one = evaluate(ToyPolicy(), task, episodes=5)
    two = evaluate_checkpoint(tmp_path, task, episodes=5, workers=2, load=load_toy)
    np.testing.assert_array_equal(one.returns, two.returns)
    np.testing.assert_array_equal(one.seeds, two.seeds)
    with pytest.raises(ConfigError, match="power of two"):
        evaluate_checkpoint(tmp_path, task, episodes=5, workers=2, load=load_toy, num_steps=3)


def test_the_toy_is_registered():
    assert isinstance(toy_task().make().unwrapped, gymnasium.Env)

"""Meta-World: a seed alone decides an episode, the goal is seen, tasks come in turn, scripts solve them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("metaworld")

from flowpolicy.errors import ConfigError  # noqa: E402
from flowpolicy.evaluation.task import Task  # noqa: E402
from flowpolicy_envs.metaworld import MetaWorldExpert  # noqa: E402
from flowpolicy_envs.scripted import ScriptedConfig, collect_scripted, play  # noqa: E402

ENV_ID = "flowpolicy_envs:flowpolicy/MetaWorld-v0"
TASKS = ("push-v3", "drawer-open-v3")


@pytest.fixture(scope="module")
def push() -> Iterator[Any]:
    env = gymnasium.make(ENV_ID, task="push-v3")
    yield env
    env.close()


@pytest.fixture(scope="module")
def several() -> Iterator[Any]:
    env = gymnasium.make(ENV_ID, tasks=TASKS)
    yield env
    env.close()


def _rollout(env: Any, seed: int, steps: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    seen = [env.reset(seed=seed)[0]]
    seen += [env.step(rng.uniform(-1, 1, 4).astype(np.float32))[0] for _ in range(steps)]
    return np.stack(seen)


def test_an_episode_depends_on_its_seed_alone(push: Any) -> None:
    first = _rollout(push, 3)
    _rollout(push, 4, steps=30)
    push.reset()  # a reset without a seed changes what a generator holds
    np.testing.assert_array_equal(_rollout(push, 3), first)
    fresh = gymnasium.make(ENV_ID, task="push-v3")
    np.testing.assert_array_equal(_rollout(fresh, 3), first)
    fresh.close()


def test_objects_and_the_visible_goal_lie_elsewhere_for_every_seed(push: Any) -> None:
    starts = np.stack([push.reset(seed=seed)[0] for seed in range(6)])
    assert starts.dtype == np.float32
    for part in (starts[:, 4:6], starts[:, 36:38]):  # the puck, the goal
        assert np.unique(part.round(4), axis=0).shape == (6, 2)
    np.testing.assert_array_equal(starts[:, :18], starts[:, 18:36])  # nothing has moved yet
    goal = push.unwrapped._simulator.env._target_pos
    np.testing.assert_allclose(starts[-1, 36:], goal, atol=1e-6)
    after = push.step(np.zeros(4, np.float32))[0]
    np.testing.assert_allclose(after[36:], starts[-1, 36:], atol=1e-6)


def test_placing_is_as_meta_world_places(push: Any) -> None:
    from metaworld.env_dict import ENV_CLS_MAP

    observation, _ = push.reset(seed=5)
    theirs = ENV_CLS_MAP["push-v3"]()
    theirs._set_task_called, theirs._partially_observable = True, False
    theirs._last_rand_vec = push.unwrapped._simulator.env._last_rand_vec  # and it stays frozen to that
    expected, _ = theirs.reset()
    theirs.close()
    np.testing.assert_allclose(observation, expected, atol=1e-3)


def test_success_ends_the_episode_and_is_the_only_reward(push: Any) -> None:
    attempt = play(push, MetaWorldExpert(slowest=1.0, detour=0.0), seed=0)
    episode = attempt.episode
    assert attempt.way == "straight"
    assert episode.success
    assert episode.terminated
    assert len(episode) < push.spec.max_episode_steps
    assert episode.reward.tolist() == [0.0] * (len(episode) - 1) + [1.0]


def test_the_dense_reward_is_more_than_success() -> None:
    env = gymnasium.make(ENV_ID, task="reach-v3", reward="dense")
    env.reset(seed=0)
    rewards = [env.step(np.zeros(4, np.float32))[1] for _ in range(3)]
    env.close()
    assert all(0 < reward < 10 for reward in rewards)


def test_tasks_are_played_in_turn_by_seed(several: Any) -> None:
    for seed in range(4):
        observation, info = several.reset(seed=seed)
        assert several.observation_space.contains(observation)
        assert info["task"] == TASKS[seed % 2]
        assert observation["task"].tolist() == [float(seed % 2 == 0), float(seed % 2 == 1)]
        assert several.step(np.zeros(4, np.float32))[4]["task"] == TASKS[seed % 2]
    several.reset(seed=0)
    assert several.reset()[1]["task"] == TASKS[1]
    assert several.reset()[1]["task"] == TASKS[0]


def test_a_task_among_several_is_the_task_alone(several: Any, push: Any) -> None:
    observation, _ = several.reset(seed=4)
    np.testing.assert_array_equal(observation["observation"], push.reset(seed=4)[0])


def test_demonstrations_go_several_ways_and_keep_what_was_intended(push: Any) -> None:
    expert = MetaWorldExpert(slowest=0.5, detour=0.06)
    attempts = [play(push, expert, seed) for seed in range(8)]
    ways = {attempt.way for attempt in attempts}
    assert ways == {"straight", "left", "right"}
    assert sum(bool(attempt.episode.success) for attempt in attempts) >= 7
    lengths = {len(attempt.episode) for attempt in attempts}
    assert len(lengths) > 4


def test_left_and_right_part_and_meet_again(push: Any) -> None:
    tracks = {}
    for way in ("left", "right"):
        seed = next(s for s in range(40) if _way_of(push, s) == way)
        expert = MetaWorldExpert(slowest=1.0, detour=0.06)
        episode = play(push, expert, seed).episode
        hand, puck = episode.observation["observation"][:, :2], episode.observation["observation"][0, 4:6]
        ahead = (puck - hand[0]) / np.linalg.norm(puck - hand[0])
        tracks[way] = (hand - hand[0]) @ np.array([-ahead[1], ahead[0]])
    assert tracks["left"].max() > 0.035
    assert tracks["right"].min() < -0.035


def _way_of(env: Any, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return MetaWorldExpert(slowest=1.0, detour=0.06).reset(env, rng)


def test_as_many_episodes_of_each_task_are_collected(several: Any) -> None:
    del several
    config = ScriptedConfig("flowpolicy_envs.metaworld:MetaWorldExpert", episodes=2)
    task = Task("both", ENV_ID, {"tasks": list(TASKS)})
    attempts, _ = collect_scripted(task.make, config)
    assert sorted(attempt.episode.task for attempt in attempts) == sorted(TASKS * 2)
    assert [attempt.seed for attempt in attempts] == sorted(attempt.seed for attempt in attempts)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"task": "pusch-v3"}, "did you mean 'push-v3'"),
        ({}, "given instead of task"),
        ({"task": "push-v3", "tasks": ["push-v3"]}, "given instead of task"),
        ({"tasks": ["push-v3", "push-v3"]}, "without repetitions"),
        ({"task": "push-v3", "reward": "shaped"}, "sparse or dense"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_sentence(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        gymnasium.make(ENV_ID, **kwargs)


def test_every_camera_is_the_right_way_up() -> None:
    pytest.importorskip("mujoco")
    from flowpolicy.evaluation.rendering import choose_gl_backend

    if choose_gl_backend() is None:
        pytest.skip("no off-screen OpenGL works here")
    for camera in ("corner", "behindGripper"):  # the first hangs upside down in Meta-World's files
        env = gymnasium.make(ENV_ID, task="push-v3", render_mode="rgb_array", camera=camera, size=64)
        env.reset(seed=0)
        image = env.render()
        env.close()
        assert image.shape == (64, 64, 3)
        red, green, blue = image.astype(int).transpose(2, 0, 1)
        is_wood = (red - blue > 15) & (red - green < 50)
        assert is_wood[32:].mean() > 2 * is_wood[:32].mean()  # the table is below


@pytest.mark.parametrize("task", ["drawer-open-v3", "assembly-v3", "hammer-v3", "soccer-v3", "dial-turn-v3"])
def test_another_environment_goes_on_from_a_state_to_the_last_bit(task: str) -> None:
    one, other = (gymnasium.make(ENV_ID, task=task, reward="dense").unwrapped for _ in range(2))
    rng = np.random.default_rng(0)
    _rollout(one, 3, steps=20)
    state = pickle.loads(pickle.dumps(one.clone_state()))
    actions = rng.uniform(-1, 1, (10, 4)).astype(np.float32)
    expected = [one.step(action) for action in actions]
    for seed in (8, 9):  # twice from one state
        _rollout(other, seed)
        other.restore_state(state)
        for action, (observation, reward, _, _, info) in zip(actions, expected, strict=True):
            found = other.step(action)
            np.testing.assert_array_equal(found[0], observation)
            assert (found[1], found[4]) == (reward, info)
    np.testing.assert_array_equal(_rollout(other, 4), _rollout(one, 4))
    one.close()
    other.close()


def test_a_state_at_the_start_replaces_what_an_older_episode_left() -> None:
    """Bin-picking's dense reward remembers a distance that it measures in the first step."""
    one, other = (gymnasium.make(ENV_ID, task="bin-picking-v3", reward="dense").unwrapped for _ in range(2))
    one.reset(seed=3)
    _rollout(other, 4)
    other.restore_state(one.clone_state())
    action = np.float32([0.5, 0.2, -1.0, 1.0])
    assert other.step(action)[1] == one.step(action)[1]
    one.close()
    other.close()


@pytest.mark.parametrize("task", ["basketball-v3", "door-lock-v3"])  # whose places are views of the simulator
def test_a_task_that_never_ran_here_can_be_gone_on_with(task: str) -> None:
    tasks = ("push-v3", task)
    one, other = (gymnasium.make(ENV_ID, tasks=tasks, reward="dense").unwrapped for _ in range(2))
    one.reset(seed=1)
    other.reset(seed=0)
    other.restore_state(one.clone_state())
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32):
        found, expected = other.step(action), one.step(action)
        np.testing.assert_array_equal(found[0]["observation"], expected[0]["observation"])
        assert found[1] == expected[1]
    other.reset()
    assert other.task == task  # after its own push, whatever it went on with
    fresh = gymnasium.make(ENV_ID, tasks=tasks, reward="dense").unwrapped
    np.testing.assert_array_equal(
        other.reset(seed=5)[0]["observation"], fresh.reset(seed=5)[0]["observation"]
    )
    for env in (one, other, fresh):
        env.close()


def test_a_state_says_which_of_several_tasks_it_is_of(several: Any) -> None:
    other = gymnasium.make(ENV_ID, tasks=TASKS).unwrapped
    several.reset(seed=1)
    other.reset(seed=2)
    other.restore_state(several.unwrapped.clone_state())
    assert other.task == several.unwrapped.task == TASKS[1]
    action = np.ones(4, dtype=np.float32)
    found, expected = other.step(action)[0], several.step(action)[0]
    for key in ("observation", "task"):
        np.testing.assert_array_equal(found[key], expected[key])
    other.close()

"""Native chunks: what Gymnasium's own step gives, to the last bit; episodes that go on from saved states."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("stable_baselines3")
pytest.importorskip("gymnasium_robotics")

import gymnasium
import torch
from omegaconf import OmegaConf
from stable_baselines3.common.vec_env import DummyVecEnv

from flowpolicy import FlowPolicy
from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.evaluation.task import task_from
from flowpolicy.finetuning.branching import BranchingChunks
from flowpolicy.finetuning.environments import LocalChunks
from flowpolicy.finetuning.native_environments import NativeChunks, native_task
from flowpolicy.finetuning.online_run import _environments
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.staggered import CutFirstEpisode
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy.config import PolicyConfig
from flowpolicy_envs.native_locomotion import Hopper, Walker2d

KEYS, HISTORY = ("observation",), 2
TASKS = {
    "hopper": 80, "walker2d": 60, "halfcheetah": 11, "ant": 11, "humanoid": 60,
    "adroit_door": 7, "adroit_hammer": 7, "adroit_pen": 7, "adroit_relocate": 7,
}  # fmt: skip
"""Task -> time limit: most episodes of the first three that fall end before it."""


def environments(repo_root: Any, name: str, count: int = 2) -> tuple[list[Any], str]:
    """Environments of a task, the second of which has a short first episode, and the task's native form."""
    settings = OmegaConf.to_container(OmegaConf.load(repo_root / "configs" / "env" / f"{name}.yaml"))
    assert isinstance(settings, dict)
    task = task_from(settings)
    envs = [task.make(max_episode_steps=TASKS[name], disable_env_checker=True) for _ in range(count)]
    return [envs[0], *(CutFirstEpisode(env, 6) for env in envs[1:])], settings["native"]


def chunks_for(env: LocalChunks, calls: int) -> np.ndarray:
    """Chunks of 4 actions, some of them out of bounds."""
    size = (calls, env.num_envs, 4, *env.action_space.shape)
    return np.random.default_rng(1).uniform(-1.3, 1.3, size) * env.action_space.high


def assert_equal(step: Any, other: Any, rows: Any = slice(None), others: Any = slice(None)) -> None:
    for field in dataclasses.fields(step):
        mine, theirs = getattr(step, field.name), getattr(other, field.name)
        if isinstance(mine, dict):
            mine, theirs = mine["observation"], theirs["observation"]
        np.testing.assert_array_equal(mine[rows], theirs[others], err_msg=field.name)


@pytest.mark.parametrize("name", TASKS)
def test_chunks_and_episodes_are_gymnasiums_and_go_on_from_saved_states(name: str, repo_root: Any) -> None:
    (envs, native), (others, _) = environments(repo_root, name), environments(repo_root, name)
    plain = LocalChunks(envs, KEYS, HISTORY)
    chunks = NativeChunks(others, KEYS, HISTORY, native_task(native), threads=1 + (name == "hopper"))
    np.testing.assert_array_equal(plain.reset(5)["observation"], chunks.reset(5)["observation"])
    calls = chunks_for(plain, 30 if TASKS[name] > 20 else 4)
    for actions in calls:
        assert_equal(chunks.step(actions), plain.step(actions))
    episodes, expected = chunks.pop_episodes(), plain.pop_episodes()
    assert len(episodes) >= 2
    for mine, theirs in zip(episodes, expected, strict=True):
        assert mine.ret == pytest.approx(theirs.ret, rel=1e-13, abs=1e-10)
        assert (mine.length, mine.success) == (theirs.length, theirs.success)
    states = chunks.states()
    onwards = [chunks.step(actions) for actions in calls[:2]]
    np.testing.assert_array_equal(
        chunks.reset_to(states.rows([1, 0]))["observation"], states.histories["observation"][[1, 0]]
    )
    for actions, expected_step in zip(calls[:2], onwards, strict=True):
        step, both = chunks.step(actions[[1, 0]]), [1, 0]
        ended = (expected_step.terminated | expected_step.truncated)[both]
        assert_equal(
            dataclasses.replace(step, observation=step.final_observation),
            dataclasses.replace(expected_step, observation=expected_step.final_observation),
            slice(None), both,
        )  # fmt: skip
        if ended.any():
            break  # what comes next is drawn by each environment for itself
    plain.close()
    chunks.close()


def test_success_may_end_an_episode(repo_root: Any) -> None:
    settings: Any = OmegaConf.to_container(OmegaConf.load(repo_root / "configs" / "env" / "adroit_pen.yaml"))
    settings["env_kwargs"] = {"reward_type": "sparse", "ends_at_success": True, "max_episode_steps": 20}
    task = task_from(settings)
    plain, chunks = (
        kind([task.make(disable_env_checker=True) for _ in range(8)], KEYS, 1, *more)
        for kind, more in ((LocalChunks, ()), (NativeChunks, (native_task(settings["native"]),)))
    )
    plain.reset(5)
    chunks.reset(5)
    ended = []
    for _ in range(15):
        actions = np.zeros((8, 4, 24))
        step, expected = chunks.step(actions), plain.step(actions)
        assert_equal(step, expected)
        ended += list(
            zip(step.terminated, step.success, step.executed, step.rewards.sum(axis=1), strict=True)
        )
    assert any(terminated for terminated, *_ in ended)  # a target is near by chance
    for terminated, success, executed, reward in ended:
        assert terminated == success
        assert reward == pytest.approx(10 - 0.1 * (executed - 1) if success else -0.1 * executed)
    plain.close()
    chunks.close()


def test_a_group_of_chunks_starts_from_one_state(repo_root: Any) -> None:
    envs, _ = environments(repo_root, "hopper", 3)
    chunks = NativeChunks(envs, KEYS, 1, Hopper)
    with pytest.raises(FlowPolicyError, match=r"call reset\(\)"):
        chunks.states()
    chunks.reset(0)
    states = chunks.states()
    with pytest.raises(FlowPolicyError, match=r"2 states for 3 environments; .*states\.rows"):
        chunks.reset_to(states.rows([0, 1]))
    chunks.reset_to(states.rows(np.repeat(1, 3)))
    step = chunks.step(np.repeat(chunks_for(chunks, 1)[0][:1], 3, axis=0))
    assert_equal(step, step, slice(None), [1, 2, 0])
    chunks.close()


def test_branches_reproduce_bit_for_bit(repo_root: Any) -> None:
    plain, branched = (
        NativeChunks(environments(repo_root, "hopper", 4)[0], KEYS, HISTORY, Hopper) for _ in range(2)
    )
    chunks, first, sides = BranchingChunks(branched, group_size=2, length=2), [0, 2], [1, 3]
    np.testing.assert_array_equal(plain.reset(5)["observation"][first], chunks.reset(5)["observation"][sides])
    came_to_an_end, alike = False, True
    for number, actions in enumerate(chunks_for(plain, 12)):
        if number % 4 < 2:  # every other branch does what the first of its group does
            actions[sides] = actions[first]
        step, expected = chunks.step(actions), plain.step(actions)
        assert_equal(step, expected, first, first)  # whose path no side branch disturbs
        ended = (step.terminated | step.truncated)[first]
        if number % 4 == 0 or (number % 4 == 1 and alike):
            for field in ("rewards", "executed", "terminated"):
                np.testing.assert_array_equal(getattr(step, field)[sides], getattr(step, field)[first])
            final = step.final_observation["observation"]
            np.testing.assert_array_equal(final[sides], final[first])
        alike, came_to_an_end = not ended.any(), came_to_an_end or bool(ended.any())
        if number % 2:
            assert (step.truncated ^ step.terminated)[sides].all()
            np.testing.assert_array_equal(
                step.observation["observation"][sides], step.observation["observation"][first]
            )
    assert came_to_an_end
    episodes, expected_episodes = chunks.pop_episodes(), plain.pop_episodes()
    assert episodes
    assert all(episode in expected_episodes for episode in episodes)
    plain.close()
    chunks.close()


def test_what_is_not_the_tasks_own_environment_is_refused(repo_root: Any) -> None:
    class Rewarded(gymnasium.Wrapper):  # type: ignore[type-arg]
        pass

    class OtherVersion(Hopper):
        def outcomes(self, actions: np.ndarray, quantities: Any) -> Any:
            found = super().outcomes(actions, quantities)
            return dataclasses.replace(found, rewards=found.rewards + 1e-6)

    def hopper() -> Any:
        return gymnasium.make("Hopper-v5", disable_env_checker=True)

    for env, task, words in (
        (
            hopper(),
            Walker2d,
            "Walker2d is the native form of Walker2dEnv, and the environment is a HopperEnv",
        ),
        (Rewarded(hopper()), Hopper, "HopperEnv alone, and the environment has a Rewarded around it"),
        (hopper(), OtherVersion, "OtherVersion computes another reward than HopperEnv of the version"),
    ):
        with pytest.raises(TaskError, match=words):
            NativeChunks([env], KEYS, 1, task)
    with pytest.raises(ConfigError, match=r"env\.native=flowpolicy_envs:Nothing cannot be found \("):
        native_task("flowpolicy_envs:Nothing")
    with pytest.raises(ConfigError, match=r"env\.native=collections:OrderedDict is no NativeTask"):
        native_task("collections:OrderedDict")


def fine_tuned(native: str | None, steps: int = 2 * 24 * 2 * 3) -> tuple[Any, ReinFlow]:
    """The environments that a fine-tuning run takes, and a model that learnt in them."""
    settings = {"name": "hopper", "env_id": "Hopper-v5", "native": native}
    torch.manual_seed(0)
    network = TransformerConfig(width=16, depth=1, num_heads=2)
    policy = FlowPolicy(
        PolicyConfig({"name": "shortcut"}, network, {"observation": (11,)}, 3, 1, 4, 4)
    ).eval()
    config: Any = SimpleNamespace(env=settings, num_envs=2, stagger=True, workers=0)
    group: Any = SimpleNamespace(count=1, rank=0)
    env = _environments(config, task_from(settings), policy, group)
    model = ReinFlow(policy, env, num_steps=2, n_steps=24, batch_size=24, n_epochs=1, critic_warmup=0, seed=0)
    if steps:
        model.learn(steps)
    env.close()
    return env, model


def test_fine_tuning_takes_what_the_task_names_and_learns_the_same(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        native, model = fine_tuned("flowpolicy_envs.native_locomotion:Hopper")
        plain, reference = fine_tuned(None)
        assert not caplog.text
        other, _ = fine_tuned("flowpolicy_envs.native_locomotion:Walker2d", steps=0)
    assert isinstance(native.chunks, NativeChunks)
    assert type(plain) is type(other) is DummyVecEnv
    assert "environment is a HopperEnv. The environments' own step is used" in caplog.text
    assert model.num_timesteps == reference.num_timesteps
    assert len(model.ep_info_buffer) == len(reference.ep_info_buffer) > 2
    weights = reference.policy.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.policy.state_dict().items())

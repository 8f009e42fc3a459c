"""Episodes of a policy in a store are those of an evaluation, whole and in the order of their seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytest.importorskip("zarr")

from flowpolicy import FlowPolicy  # noqa: E402
from flowpolicy.data.store import read_demonstrations  # noqa: E402
from flowpolicy.errors import DataError, TaskError  # noqa: E402
from flowpolicy.evaluation.rollout import evaluate  # noqa: E402
from flowpolicy.evaluation.task import Task  # noqa: E402
from flowpolicy.models.config import TransformerConfig  # noqa: E402
from flowpolicy.policy import PolicyConfig  # noqa: E402
from flowpolicy.runs.seeds import derived_seed  # noqa: E402
from flowpolicy_envs.policy_collection import collect_policy, collect_policy_store  # noqa: E402

TASK = Task("pole", "InvertedPendulum-v5", execute_horizon=2, control_hz=25.0)


class Tilted(gymnasium.Wrapper):
    """Success: the pole fell to the right."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "success": bool(observation[1] > 0.2)}


gymnasium.register("Tilted-v0", entry_point=lambda **_: Tilted(gymnasium.make("InvertedPendulum-v5")))


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    task = {"name": "pole", "env_id": "InvertedPendulum-v5", "execute_horizon": 2, "control_hz": 25.0}
    config = PolicyConfig(
        {"name": "flow_matching"}, model, {"observation": (4,)}, 1, 1, 4, 2, task=task
    )  # fmt: skip
    return FlowPolicy(config).eval()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_they_are_the_episodes_of_an_evaluation_of_these_seeds(policy, num_envs):
    kept, played = collect_policy(policy, TASK, 5, seed=7, num_envs=num_envs)
    evaluated = evaluate(policy, TASK, episodes=5, seed=7, num_envs=2, show_progress=False)
    assert played == 5
    assert [len(episode) for episode in kept] == evaluated.lengths.tolist()
    assert len({len(episode) for episode in kept}) > 1
    np.testing.assert_allclose([episode.total for episode in kept], evaluated.returns)
    bound = TASK.make().action_space.high
    assert all((np.abs(episode.action) <= bound).all() for episode in kept)


def test_successes_alone_are_kept_on_demand(policy):
    task = Task("tilted", "Tilted-v0", execute_horizon=2)
    everything, _ = collect_policy(policy, task, 12, num_envs=4)
    lucky = [episode.total for episode in everything if episode.success]
    assert 0 < len(lucky) < 12
    kept, played = collect_policy(policy, task, len(lucky), num_envs=4, only_successes=True)
    assert [episode.total for episode in kept] == lucky
    assert played == 1 + max(number for number, episode in enumerate(everything) if episode.success)
    with pytest.raises(DataError, match="gives no info"):
        collect_policy(policy, TASK, 1, only_successes=True)


def test_a_store_says_whose_episodes_it_holds_and_a_refused_one_leaves_nothing(policy, tmp_path):
    policy.save(tmp_path / "checkpoint")
    path, demos = collect_policy_store(
        str(tmp_path / "checkpoint"), out=tmp_path / "own.zarr.zip", episodes=3, num_steps=1, seed=2
    )
    read = read_demonstrations(path)
    assert read.num_episodes == 3
    about = read.attributes
    assert (about["level"], about["task"], about["num_steps"]) == ("policy", "pole", 1)
    assert about["first_seed"] == derived_seed(2, "collection")
    assert about["return_mean"] == pytest.approx(float(read.arrays["reward"].sum()) / 3)
    assert np.array_equal(read.arrays["action"], demos.arrays["action"])
    with pytest.raises(DataError, match="exists"):
        collect_policy_store(str(tmp_path / "checkpoint"), out=path)
    other = {"name": "other", "env_id": "Pendulum-v1"}
    with pytest.raises(TaskError, match="observation"):
        collect_policy_store(str(tmp_path / "checkpoint"), other, out=tmp_path / "no.zarr.zip")
    assert not (tmp_path / "no.zarr.zip").exists()

"""An update rule that the package does not have, written as a user would: the loop, the critic, saving and
evaluation are ReinFlow's.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from toy_practice import Reach, make, make_policy

from flowpolicy import FlowPolicy
from flowpolicy.errors import CheckpointError
from flowpolicy.finetuning.advantages import GAE
from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import UPDATE_RULES, UpdateRule, shared_draws
from flowpolicy.finetuning.run import finetune


@dataclass(frozen=True)
class AdvantageWeighted(UpdateRule):
    """Advantage-weighted flow matching (AWM, Xue et al. 2025; FPO, McAllister et al. 2025).

    The flow-matching loss of an executed chunk stands for its negative log-likelihood: the ratio is
    exp(l_old - l) at the same draws of (t, x_0), clipped as in PPO. Exploration is the flow's own x_0.

    Attributes:
        draws: of (t, x_0) for each chunk.
        clip_range: the ratio's allowed distance from 1.
        pull: weight of the squared distance to the pretrained velocity.
    """

    name: ClassVar[str] = "advantage_weighted"
    injects_noise: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    draws: int = 4
    clip_range: float = 0.05
    pull: float = 0.0

    def prepare(self, flow, data, reference, generator):
        t, noise = shared_draws(data, self.draws, generator)
        kept = {"t": t, "noise": noise}
        kept["behaviour"] = self.velocity(flow, data, kept)
        kept["reference"] = self.velocity(reference, data, kept)
        return kept

    def velocity(self, flow, batch, kept):
        t = kept["t"][..., None, None]
        return flow.velocity(batch.observation, (1 - t) * kept["noise"] + t * batch.chunk[:, None], kept["t"])

    def loss(self, flow, batch):
        mask = batch.chunk_mask[:, None]
        velocity, target = self.velocity(flow, batch, batch.kept), batch.chunk[:, None] - batch.kept["noise"]

        def distance(other, to):  # (B,): of each chunk, over its draws and executed actions
            return (((other - to) ** 2) * mask).sum((2, 3)).mean(1)

        ratio = (distance(batch.kept["behaviour"], target) - distance(velocity, target)).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
        pull = distance(velocity, batch.kept["reference"]).mean()
        with torch.no_grad():
            metrics = {
                "train/policy_loss": -surrogate,
                "train/kl": (ratio - 1 - ratio.log()).mean(),
                "train/clip_fraction": ((ratio - 1).abs() > self.clip_range).float().mean(),
                "train/pull": pull,
            }
        return self.pull * pull - surrogate, metrics


@pytest.fixture
def registered():
    UPDATE_RULES[AdvantageWeighted.name] = AdvantageWeighted
    yield
    del UPDATE_RULES[AdvantageWeighted.name]


@pytest.mark.parametrize("objective", ["flow_matching", "shortcut"])
def test_it_improves_a_policy(objective):
    rule = AdvantageWeighted(pull=0.01)
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
        assert torch.equal(parameter, earlier)  # no noise was injected, and none is learnt


def test_its_draws_and_velocities_are_those_of_the_behaviour_policy():
    model = make(update=AdvantageWeighted(), n_epochs=2, learning_rate=0.0)
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
        assert ((times * 4).floor() == torch.arange(4)).all()  # one in each quarter


class Double(Reach):
    """Takes actions in double precision."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float64)


def test_bounds_of_another_precision_leave_that_of_the_chunks():
    model = make(env=make_vec_env(Double, n_envs=4, seed=0), update=AdvantageWeighted())
    assert model.actor_critic.executed(torch.full((1, 4, 2), 9.0)).dtype == torch.float32
    model.learn(1)


def test_a_user_gets_the_actions_that_it_learns_from():
    model, chunks = make(update=AdvantageWeighted()), []
    for deterministic in (False, True):
        torch.manual_seed(0)
        chunks.append(model.predict(np.zeros((3, 2), np.float32), deterministic=deterministic)[0])
    np.testing.assert_array_equal(*chunks)


def test_the_reference_that_a_user_gave_stays_where_it_is(monkeypatch):
    moved, reference = [], make_policy()
    monkeypatch.setattr(NoisyFlow, "to", lambda flow, device: moved.append(flow) or flow)
    make(update=AdvantageWeighted(), reference=reference)
    assert moved
    assert all(flow.network is not reference.network for flow in moved)


@pytest.mark.usefixtures("empty_figures")
def test_it_may_be_named_in_a_run_whose_state_is_loaded_with_the_pretrained_policy(registered, tmp_path):
    make_policy().save(tmp_path / "pretrained")
    settings = {
        "env": {"name": "reach", "env_id": "toy_practice:toy/Reach-v0"}, "video": False,
        "checkpoint": str(tmp_path / "pretrained"), "num_steps": 2, "total_steps": 400, "num_envs": 4,
        "workers": 0, "final_episodes": 2, "evaluation_envs": 2, "update": {"name": "advantage_weighted"},
        "reinflow": {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "critic_warmup": 0},
    }  # fmt: skip
    finetune({**settings, "total_steps": 100}, tmp_path / "run")
    state = tmp_path / "run" / "training_state.zip"
    with pytest.raises(CheckpointError, match="reference="):
        ReinFlow.load(state)
    loaded = ReinFlow.load(state, reference=FlowPolicy.load(tmp_path / "run" / "base"))
    assert loaded.update == AdvantageWeighted()


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
    model = make(advantages=GroupMean(), update=AdvantageWeighted())
    model.learn(1)
    advantage = model.rollout_buffer.data(
        model.actor_critic.values, model.collector.after, model.scale, model.advantages
    ).advantage.reshape(-1, 2)
    torch.testing.assert_close(advantage.sum(1), torch.zeros(len(advantage)), rtol=0, atol=1e-5)
    model.save(tmp_path / "model")
    given = {"update": AdvantageWeighted(), "reference": make_policy()}
    with pytest.raises(CheckpointError, match="advantages of its user's own"):
        ReinFlow.load(tmp_path / "model", **given)
    assert ReinFlow.load(tmp_path / "model", advantages=GAE(0.9, 0.9), **given).num_timesteps > 0

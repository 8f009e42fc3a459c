"""A script as in stable-baselines3's documentation, with one of ours in the place of PPO."""

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

import gymnasium as gym
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv
from toy_practice import Reach, make, make_policy

from flowpolicy.finetuning.offpolicy.algorithms import QChunk
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import NFT

REINFLOW = {"n_steps": 16, "batch_size": 32, "critic_warmup": 0}
OFFPOLICY = {
    "algorithm": QChunk(proposals=2, target_proposals=2), "members": 2, "critic_hidden": (8,),
    "batch_size": 8, "learning_starts": 50, "utd": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "vec_env_cls", "settings"),
    [
        (ReinFlow, None, {**REINFLOW, "update": NFT()}),
        (ReinFlow, SubprocVecEnv, REINFLOW),
        (OffPolicy, None, OFFPOLICY),
    ],
)
def test_the_documentations_script_runs(tmp_path, kind, vec_env_cls, settings):
    vec_env = make_vec_env(Reach, n_envs=4, seed=0, vec_env_cls=vec_env_cls)
    model = kind(
        make_policy(), vec_env, num_steps=2, verbose=0, seed=0, learning_rate=1e-3, gamma=0.9, **settings
    )
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    callbacks = CallbackList([
        CheckpointCallback(save_freq=50, save_path=str(tmp_path / "steps"), name_prefix="rl_model"),
        EvalCallback(
            Monitor(Reach()), best_model_save_path=str(tmp_path / "best"), log_path=str(tmp_path / "best"),
            eval_freq=40, n_eval_episodes=3, deterministic=True, render=False, verbose=0,
        ),
    ])  # fmt: skip
    model.learn(total_timesteps=1_000, callback=callbacks, progress_bar=False)
    model.save(tmp_path / "reach")
    before = model.num_timesteps
    assert before >= 1_000
    del model  # remove to demonstrate saving and loading

    model = kind.load(tmp_path / "reach", env=vec_env)
    mean_reward, std_reward = evaluate_policy(model, model.get_env(), n_eval_episodes=10, warn=False)
    assert 0 < mean_reward < 10
    assert std_reward >= 0
    model.learn(200, reset_num_timesteps=False)
    assert model.num_timesteps >= before + 200
    # 50 calls, each of four environments
    assert kind.load(tmp_path / "steps" / "rl_model_200_steps.zip").num_timesteps == 200
    best = kind.load(tmp_path / "best" / "best_model")
    assert best.predict(np.zeros(2, np.float32), deterministic=True)[0].shape == (2,)
    assert len(np.load(tmp_path / "best" / "evaluations.npz")["timesteps"]) >= 5
    assert "rollout/ep_rew_mean" in (tmp_path / "log" / "progress.csv").read_text().splitlines()[0]

    obs = vec_env.reset()  # the documentation's loop
    state, starts = None, np.ones(4, bool)
    total = np.zeros(4)
    for _ in range(10):
        action, state = model.predict(obs, state=state, episode_start=starts)
        obs, rewards, starts, _ = vec_env.step(action)
        total += rewards
    assert starts.all()
    assert (total > 0).all()
    vec_env.close()


def test_callbacks_stop_early(tmp_path):
    threshold = StopTrainingOnRewardThreshold(reward_threshold=-1, verbose=0)
    model = make()
    model.learn(
        100_000, callback=EvalCallback(Reach(), callback_on_new_best=threshold, eval_freq=10, warn=False)
    )
    assert model.num_timesteps == 40
    patience = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1, verbose=0)
    model = make(learning_rate=0.0)
    watch = EvalCallback(Reach(), eval_freq=10, callback_after_eval=patience, warn=False)
    model.learn(100_000, callback=watch)
    assert model.num_timesteps < 10_000


def test_an_environment_may_be_given_by_its_id():
    gym.register("toy/ReachById-v0", Reach)
    model = ReinFlow(make_policy(), "toy/ReachById-v0", num_steps=2, n_steps=8, batch_size=8, critic_warmup=0)
    model.learn(50)
    assert model.num_timesteps >= 50
    parameters = model.get_parameters()
    other = ReinFlow(make_policy(), "toy/ReachById-v0", num_steps=2)
    other.set_parameters(parameters)
    for name, tensor in model.actor_critic.state_dict().items():
        assert (other.actor_critic.state_dict()[name] == tensor).all()

"""ReinFlow as a stable-baselines3 user meets it, on environments of a few microseconds a step."""

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor
from toy_practice import Reach, make, make_policy

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import GDRO
from flowpolicy.models.config import MLPConfig
from flowpolicy.policy import FlowPolicy


def test_a_policy_that_does_not_move_keeps_its_ratio_at_one():
    model = make(learning_rate=0.0, n_epochs=3)
    seen = []
    step = model.learner.policy_step
    model.learner.policy_step = lambda batch: seen.append(step(batch)) or seen[-1]
    model.learn(1)  # one iteration
    assert len(seen) == 3 * 2  # two minibatches in each of three epochs
    assert max(metrics["train/ratio_spread"] for metrics, _ in seen) < 1e-4
    assert max(abs(metrics["train/kl"]) for metrics, _ in seen) < 1e-4


def test_the_gradient_does_not_depend_on_how_many_chunks_pass_at_once(monkeypatch):
    def gradients(tokens):
        monkeypatch.setattr("flowpolicy.finetuning.learner.TOKENS_AT_ONCE", tokens)
        model = make(batch_size=16, n_epochs=1, learning_rate=0.0, max_grad_norm=1e9)
        found = []
        step = model.learner.policy_step

        def kept(batch):
            found.append(step(batch)[0])
            found.append({key: p.grad.clone() for key, p in model.actor_critic.flow.named_parameters()})
            return found[-2], True

        model.learner.policy_step = kept
        model.learn(1)
        return found

    whole, parts = gradients(10**6), gradients(5 * 16)  # 16 chunks of 16 tokens: 5 + 5 + 5 + 1
    assert len(whole) == len(parts) > 2
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)
    assert max(float(value.abs().max()) for value in whole[1].values()) > 1e-3


def test_finetuning_helps():
    env, judged_on = (make_vec_env(Reach, n_envs=n, seed=0) for n in (8, 20))
    model = make(env, n_steps=16, batch_size=64, n_epochs=4, learning_rate=2e-3, gamma=0.9)
    before, _ = evaluate_policy(model, judged_on, n_eval_episodes=40, warn=False)
    model.learn(8_000)
    after, _ = evaluate_policy(model, judged_on, n_eval_episodes=40, warn=False)
    assert after > before + 1.0, (before, after)  # of 10 at most


def test_a_network_without_blocks_is_fine_tuned():
    policy = make_policy(model=MLPConfig(width=16, hidden=32))
    model = make(policy=policy)
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    model.learn(4 * 16)
    tuned = model.actor_critic.flow_policy.network.state_dict()
    assert any(not torch.equal(tuned[name], value) for name, value in before.items())
    assert all(torch.isfinite(value).all() for value in tuned.values())


def test_a_step_far_beyond_the_kl_bound_is_taken_back_and_the_rate_falls():
    model = make(learning_rate=0.3, target_kl=0.05, n_epochs=1)
    before = [parameter.clone() for parameter in model.actor_critic.actor_parameters()]
    model.learn(1)
    for parameter, earlier in zip(model.actor_critic.actor_parameters(), before, strict=True):
        assert torch.equal(parameter, earlier)
    assert model.learner.rate_factor < 1
    lenient = make(learning_rate=0.3, target_kl=None, n_epochs=1)
    lenient.learn(1)
    moved = zip(lenient.actor_critic.actor_parameters(), before, strict=True)
    assert any(not torch.equal(parameter, earlier) for parameter, earlier in moved)


def test_timesteps_are_environment_steps():
    model = make()
    model.learn(1)
    # 16 chunks of at most 4 steps; an episode of 10 steps is chunks of 4, 4 and 2.
    assert model.num_timesteps == 4 * (5 * 10 + 4)
    assert len(model.ep_info_buffer) == 4 * 5
    assert {episode["l"] for episode in model.ep_info_buffer} == {10}


def test_a_foreign_vector_environment_gives_the_same_kind_of_experience():
    model = make(VecMonitor(make_vec_env(Reach, n_envs=4, seed=0)))
    model.learn(1)
    assert model.num_timesteps > 0
    assert {episode["l"] for episode in model.ep_info_buffer} == {10}


def test_callbacks_of_stable_baselines3_evaluate_and_stop(tmp_path):
    model = make()
    watch = EvalCallback(Reach(), n_eval_episodes=2, eval_freq=20, log_path=str(tmp_path), warn=False)
    model.learn(10_000, callback=[watch, StopTrainingOnMaxEpisodes(max_episodes=7)])
    assert model.num_timesteps == 4 * 7 * 10  # seven episodes in each of the four environments
    assert np.load(tmp_path / "evaluations.npz")["results"].shape[1] == 2


def test_predict_carries_history_and_chunk_in_its_state():
    policy = make_policy(obs_horizon=2)
    model = ReinFlow(policy, make_vec_env(Reach, n_envs=2), num_steps=2)
    torch.manual_seed(0)
    first = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    actions, state = model.predict(first, deterministic=True)
    assert actions.shape == (2, 2)
    chunk = state[-2]
    for i in range(1, 4):  # the rest of the chunk, whatever is observed
        actions, state = model.predict(first + i, state, np.zeros(2, bool), deterministic=True)
        assert np.allclose(actions, chunk[:, i].clip(-1, 1))
    history = state[0]
    assert np.allclose(history[:, 0], first + 2)
    assert np.allclose(history[:, 1], first + 3)
    _, state = model.predict(first, state, np.array([True, False]), deterministic=True)
    assert np.allclose(state[0][0], first[0])  # the new episode's first observation fills the history
    assert state[-1].tolist() == [1, 1]
    single, _ = model.predict(first[0], deterministic=True)
    assert single.shape == (2,)
    with pytest.raises(FlowPolicyError, match="without the info"):
        model.predict((first, {}))


def test_the_deployed_policy_is_the_flow_alone_and_only_for_its_steps(tmp_path):
    model = make()
    model.learn(1)
    policy = FlowPolicy.load(model.deployed_policy().save(tmp_path / "tuned"))
    observation, noise = {"observation": torch.rand(3, 1, 2)}, torch.randn(3, 4, 2)
    with torch.no_grad():
        expected = model.actor_critic.flow.flow(
            model.actor_critic.flow_policy.normalize_observations(observation), noise
        )
    found = policy.act(observation, noise=noise)
    assert torch.allclose(found, policy.action_normalizer.denormalize(expected), atol=1e-6)
    with pytest.raises(ConfigError, match="tuned for num_steps=2"):
        policy.act(observation, num_steps=4)


def test_the_average_over_iterations_is_what_is_deployed_and_predicts_and_is_saved(tmp_path):
    decay, kept, seen = 0.3, [], []
    model = make(learning_rate=1e-3, critic_warmup=0, target_kl=None, ema_decay=decay)
    network, train = model.actor_critic.flow_policy.network, model.learner.train

    def noting(*args, **kwargs):
        kept[:] = kept or [{name: value.clone() for name, value in network.state_dict().items()}]
        metrics = train(*args, **kwargs)
        weight = 1 - min(decay, (1 + len(seen)) / (10 + len(seen)))
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        kept[0] = {name: (1 - weight) * kept[0][name] + weight * value for name, value in seen[-1].items()}
        return metrics

    model.learner.train = noting
    model.learn(1000)
    model.save(tmp_path / "model")
    loaded = ReinFlow.load(tmp_path / "model", model.env)
    assert len(seen) > 4
    for each in (model, loaded):
        policy = each.deployed_policy()
        deployed = policy.network.state_dict()
        assert max(float((deployed[name] - value).abs().max()) for name, value in seen[-1].items()) > 1e-3
        for name, value in kept[0].items():
            torch.testing.assert_close(deployed[name], value, rtol=1e-4, atol=1e-6)
        torch.manual_seed(0)
        _, state = each.predict(np.zeros((1, 2), np.float32), deterministic=True)
        torch.manual_seed(0)
        chunk = policy.act({"observation": np.zeros((1, 1, 2), np.float32)})
        np.testing.assert_allclose(state[-2], chunk.numpy(), atol=1e-6)
    loaded.learn(100, reset_num_timesteps=False)  # and the average goes on
    after = loaded.deployed_policy().network.state_dict()
    assert any(not torch.equal(after[name], deployed[name]) for name in after)


def test_an_average_over_the_one_iteration_of_an_offline_rule_is_refused():
    with pytest.raises(ConfigError, match=r"ema_decay is 0\.9; it must be null, since update=gdro"):
        make(update=GDRO(), ema_decay=0.9)


def test_a_bad_setting_is_one_sentence():
    for settings, message in (({"gamma": 1.5}, "gamma is 1.5"), ({"num_steps": 3}, "powers of two")):
        with pytest.raises(ConfigError, match=message):
            make(**settings)


def test_what_is_no_environment_is_one_sentence_that_names_what_to_give():
    vector = gymnasium.make_vec("toy/Reach-v0", num_envs=2)
    for env, words in (
        (vector, "vector environment"),
        ([Reach()], "list"),
        (Reach, "class Reach"),
        (3, "int"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            ReinFlow(make_policy(), env)
        assert "make_vec_env(" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="make_vec_env"):
        make().set_env(vector)


def test_the_critic_sees_every_chunk_once_and_once_an_epoch():
    model = make(n_epochs=2)
    rows = 0

    def count(module, inputs, values):
        nonlocal rows
        rows += len(values)

    model.actor_critic.critic.register_forward_hook(count)
    model.learn(1)
    chunks, ends = 4 * 16, 4 * 5
    assert rows == chunks + 4 + ends + 2 * chunks

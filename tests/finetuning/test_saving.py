"""A saved ReinFlow model: one file without pickle, from which everything goes on."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from toy_practice import Reach, make

from flowpolicy.errors import CheckpointError, ConfigError, FlowPolicyError
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import Wasserstein
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.update import PPO


@pytest.fixture
def saved(tmp_path):
    model = make(
        learning_rate=LinearSchedule(1e-3, 1e-4, 1.0),
        noise=NoiseConfig(minimum=0.05, maximum=0.3),
        update=PPO(clip_range=0.1, reduction="per_step"),
    )
    model.learn(400)
    model.save(tmp_path / "model")
    return model, tmp_path / "model.zip"


def test_a_loaded_model_is_the_saved_one(saved):
    model, path = saved
    loaded = ReinFlow.load(path.with_suffix(""), make_vec_env(Reach, n_envs=4, seed=0))
    for name, tensor in model.actor_critic.state_dict().items():
        assert torch.equal(tensor, loaded.actor_critic.state_dict()[name]), name
    for ours, theirs in (
        (model.learner.actor_optimizer, loaded.learner.actor_optimizer),
        (model.learner.critic_optimizer, loaded.learner.critic_optimizer),
    ):
        for index, moments in ours.state_dict()["state"].items():
            for name, value in moments.items():
                assert torch.equal(value, theirs.state_dict()["state"][index][name])
    assert loaded.num_timesteps == model.num_timesteps > 400
    assert (loaded.iteration, loaded._n_updates) == (model.iteration, model._n_updates)
    assert loaded.scale.value == model.scale.value
    assert loaded.noise == model.noise
    assert loaded.update == model.update
    assert loaded.lr_schedule(0.5) == pytest.approx(5.5e-4)
    assert torch.equal(loaded.generator.get_state(), model.generator.get_state())


def test_two_models_loaded_from_one_file_learn_the_same(saved):
    _, path = saved
    ends = []
    for _ in range(2):
        loaded = ReinFlow.load(path, make_vec_env(Reach, n_envs=4, seed=0))
        loaded.learn(200, reset_num_timesteps=False)
        ends.append(loaded.actor_critic.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_file_holds_no_pickle(saved):
    with zipfile.ZipFile(saved[1]) as archive:
        assert sorted(archive.namelist()) == ["config.json", "model.safetensors"]
        assert json.loads(archive.read("config.json"))["settings"]["num_steps"] == 2


def test_without_an_environment_it_predicts_and_learns_later(saved):
    model, path = saved
    loaded = ReinFlow.load(path)
    observation = np.array([[0.2, -0.1], [3.0, 3.0]], np.float32)
    torch.manual_seed(0)
    expected, _ = model.predict(observation, deterministic=True)
    torch.manual_seed(0)
    found, _ = loaded.predict(observation, deterministic=True)
    np.testing.assert_array_equal(found, expected)
    assert (np.abs(found) <= 1).all()  # the bounds of the action space came along
    with pytest.raises(ConfigError, match="no environment"):
        loaded.learn(10)
    loaded.set_env(make_vec_env(Reach, n_envs=3, seed=0))
    before = loaded.num_timesteps
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps > before


def test_a_stream_will_do(saved):
    stream = io.BytesIO()
    saved[0].save(stream)
    stream.seek(0)
    assert ReinFlow.load(stream).num_timesteps == saved[0].num_timesteps


def test_settings_can_be_replaced_and_functions_must_be_given_again(saved, tmp_path):
    assert ReinFlow.load(saved[1], gamma=0.9).gamma == 0.9
    model = make(learning_rate=lambda left: 1e-3 * left)
    model.save(tmp_path / "function")
    with pytest.raises(CheckpointError, match="learning_rate of its user's own"):
        ReinFlow.load(tmp_path / "function")
    assert ReinFlow.load(tmp_path / "function", learning_rate=1e-4).lr_schedule(1.0) == 1e-4


def test_a_regularizer_is_not_lost_in_silence(tmp_path):
    model = make()
    term = Wasserstein(model.actor_critic.flow.frozen_copy(), 0.1)
    model.regularizers = (term,)
    model.save(tmp_path / "regularized")
    env = make_vec_env(Reach, n_envs=4)
    for loaded in (ReinFlow.load(tmp_path / "regularized", env), ReinFlow.load(tmp_path / "regularized")):
        loaded.set_env(env)
        with pytest.raises(ConfigError, match="regularizer wasserstein"):
            loaded.learn(10)
    assert ReinFlow.load(tmp_path / "regularized", env, regularizers=(term,)).regularizers == (term,)
    ReinFlow.load(tmp_path / "regularized")  # to predict it is not needed


DAMAGE = ["missing", "empty", "cut", "other zip", "newer", "other policy", "no json"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_one_sentence(saved, damage):
    path = saved[1]
    content = {"config.json": None, "model.safetensors": None}
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in content}
    config = json.loads(content["config.json"])
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        if damage == "newer":
            config["format_version"] = 99
        if damage == "other policy":
            config["policy"]["model"]["width"] = 32
        content["config.json"] = b"[" if damage == "no json" else json.dumps(config).encode()
        if damage == "other zip":
            content = {"something.txt": b"else"}
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
    with pytest.raises(CheckpointError) as caught:
        ReinFlow.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_full_disk_leaves_the_last_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(FlowPolicyError, match="disk is full"):
        model.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_would_need_pickle_is_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match="exclude"):
        saved[0].save(tmp_path / "x", exclude=["policy"])

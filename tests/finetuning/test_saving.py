"""A saved ReinFlow model: one file without pickle, from which everything goes on."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from safetensors.torch import load, save
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from toy_practice import Reach, make

from flowpolicy.errors import CheckpointError, ConfigError, FlowPolicyError
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.regularization import Wasserstein
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.rules import PPO


@pytest.fixture(scope="module")
def learnt():
    model = make(
        learning_rate=LinearSchedule(1e-3, 1e-4, 1.0),
        noise=NoiseConfig(minimum=0.05, maximum=0.3),
        update=PPO(clip_range=0.1, reduction="per_step"),
    )
    model.learn(400)
    return model


@pytest.fixture
def saved(learnt, tmp_path):
    learnt.save(tmp_path / "model")
    return learnt, tmp_path / "model.zip"


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


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model that never learnt, as the members of its file."""
    folder = tmp_path_factory.mktemp("plain")
    make().save(folder / "model")
    with zipfile.ZipFile(folder / "model.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        ReinFlow.load(path, device="cpu")
    assert str(caught.value).startswith((str(path), f"config.json of {path}"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    return str(caught.value)


def config_of(members, **changes):
    content = json.loads(members["config.json"])
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        node = content
        for group in groups:
            node = node[group]
        node[key] = value
    return {**members, "config.json": json.dumps(content)}


WRONG = ("text", {}, [[1]], -1, float("nan"), 1.5, ["x"] * 99)
FITTING = {  # of those, by setting
    "noise": [{}], "update": [{}], "grid": [{}], "target_kl": [1.5], "max_grad_norm": [1.5],
    "verbose": [-1], "tensorboard_log": WRONG,
}  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_settings_of_a_wrong_type_or_range_are_one_sentence(plain, tmp_path, value):
    for name in json.loads(plain["config.json"])["settings"]:
        if not any(value is fitting or value == fitting for fitting in FITTING.get(name, ())):
            refused(packed(tmp_path / "model.zip", config_of(plain, **{f"settings__{name}": value})))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": 3},
        {"policy": []},
        {"progress": None},
        {"progress__num_timesteps": {}},
        {"progress__iteration": -1},
        {"progress__return_scale": ["a", 1, 2]},
        {"progress__return_scale": [1.0, 0.0, -5.0]},
        {"progress__rate_factor": 1e9},
        {"regularizers": ["\x1b[31m"]},
        {"regularizers": 3},
        {"format_version": "1"},
        {"format_version": True},
        {"algorithm": ["ReinFlow"]},
        {"settings__noise": {"hidden": 10**9}},
        {"settings__critic_hidden": [8192, 8192, 8192]},
        {"settings__update": {"name": "ppo", "clip_range": "wide"}},
        {"settings__learning_rate": [1, 2]},
        {"settings__unknown": 1},
        {"settings__return": None},
        {"settings__env": 1},
        {"settings__device": "cpu"},
        {"policy__model__width": 8192, "policy__model__depth": 128},
    ],
    ids=str,
)
def test_a_file_that_describes_no_model_is_one_sentence(plain, tmp_path, changes):
    refused(packed(tmp_path / "model.zip", config_of(plain, **changes)))


def test_bombs_and_archives_of_other_kinds_are_not_unpacked(plain, tmp_path):
    path = tmp_path / "model.zip"
    bomb = {**plain, "model.safetensors": plain["model.safetensors"] + bytes(30_000_000)}
    assert "unpacks to far more" in refused(packed(path, bomb, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1_000_000
    assert "packed in another way" in refused(packed(path, plain, zipfile.ZIP_LZMA))
    for other in ({"../../evil": b"x"}, {str(number): b"" for number in range(5000)}):
        refused(packed(path, {**plain, **other}))
    data = packed(path, plain).read_bytes()
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flag of an encrypted member, in both places
        at = data.find(mark) + offset
        data = data[:at] + bytes([data[at] | 1]) + data[at + 1 :]
    path.write_bytes(data)
    assert "encrypted" in refused(path)
    packed(path, plain, zipfile.ZIP_DEFLATED)  # as someone may who packs it again
    assert ReinFlow.load(path, device="cpu").num_timesteps == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(plain, tmp_path, value):
    tensors = load(plain["model.safetensors"])
    name = next(name for name in tensors if name.endswith("output.weight"))
    members = {**plain, "model.safetensors": save({**tensors, name: torch.full_like(tensors[name], value)})}
    assert "NaN, infinity" in refused(packed(tmp_path / "model.zip", members))


def test_where_the_writer_logged_is_not_where_the_reader_logs(plain, tmp_path):
    changed = config_of(plain, settings__tensorboard_log=str(tmp_path / "stranger"))
    path = packed(tmp_path / "model.zip", changed)
    assert ReinFlow.load(path, device="cpu").tensorboard_log is None
    assert ReinFlow.load(path, device="cpu", tensorboard_log="mine").tensorboard_log == "mine"

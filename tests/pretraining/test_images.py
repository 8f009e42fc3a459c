"""Pretraining from images: in memory or from disk, resumed or not, the weights are the same."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from toy_training import toy_settings

from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.run import pretrain

SIDE = 40


class Square(gym.Env):
    """A bright square is where the action should point."""

    observation_space = gym.spaces.Dict(
        {"camera": gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8), "state": gym.spaces.Box(-1, 1, (1,))}
    )
    action_space = gym.spaces.Box(-1, 1, (2,))


gym.register("Square-v0", entry_point=Square, disable_env_checker=True)


def write_store(path, episodes=20, length=8, dtype=np.uint8):
    rng = np.random.default_rng(0)
    steps = episodes * length
    action = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
    images = np.zeros((steps, SIDE, SIDE, 3), dtype)
    for image, target in zip(images, action, strict=True):
        row, column = ((target + 1) / 2 * (SIDE - 8)).astype(int)
        image[row : row + 8, column : column + 8] = 255
    arrays = {"camera": images, "state": rng.normal(size=(steps, 1)).astype(np.float32), "action": action}
    return write_demonstrations(path, Demonstrations(arrays, np.arange(1, episodes + 1) * length))


def settings(store, steps=13, **changes):
    made = toy_settings("regression", store, steps=steps, validate_every=0)
    made["env"] |= {"env_id": "Square-v0", "action_horizon": 2, "execute_horizon": 2}
    made["data"] |= {"observation_keys": ["camera", "state"]}
    made["model"]["vision"] = {"channels": 16, "keypoints": 8}
    return {**made, **changes}


def weights(run_dir):
    return FlowPolicy.load(run_dir / "checkpoint").state_dict()


def assert_same(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.usefixtures("empty_figures")
def test_images_from_disk_train_the_same_weights_as_images_in_memory(tmp_path):
    store = write_store(tmp_path / "a.zarr.zip")
    pretrain(settings(store), tmp_path / "memory")
    mapped = settings(store)
    mapped["data"]["image_memory_gb"] = 0
    pretrain(mapped, tmp_path / "disk")
    assert (tmp_path / "a.zarr.zip.unpacked").is_dir()
    assert_same(weights(tmp_path / "memory"), weights(tmp_path / "disk"))


@pytest.mark.usefixtures("empty_figures")
def test_a_resumed_run_from_images_is_the_unbroken_one(tmp_path, monkeypatch):
    store = write_store(tmp_path / "a.zarr.zip")
    pretrain(settings(store), tmp_path / "whole")
    from flowpolicy.pretraining.trainer import Trainer

    step = Trainer.step

    def killed(trainer):
        if trainer.state.step == 12:  # the last checkpoint is of step 10
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(store), tmp_path / "broken")
    monkeypatch.undo()
    resumed = settings(store, resume=True)
    resumed["data"]["image_memory_gb"] = 0  # where the images lie is no other run
    pretrain(resumed, tmp_path / "broken")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


@pytest.mark.usefixtures("empty_figures")
def test_it_learns_to_look(tmp_path):
    store = write_store(tmp_path / "a.zarr.zip", episodes=60)
    made = settings(store, steps=90)
    made["train"] |= {"batch_size": 32, "learning_rate": 5e-3}
    made["model"]["vision"]["crop"] = 1.0
    pretrain(made, tmp_path / "run")
    fresh = write_store(tmp_path / "b.zarr.zip", episodes=70)  # the last ten were never seen
    from flowpolicy.data.store import read_demonstrations

    arrays = {key: rows[-80:, None] for key, rows in read_demonstrations(fresh).arrays.items()}
    policy = FlowPolicy.load(tmp_path / "run" / "checkpoint")
    chunk = policy.act({key: arrays[key] for key in ("camera", "state")})[:, 0].numpy()
    error = np.abs(chunk - arrays["action"][:, 0]).mean()
    assert error < 0.25  # half of what knowing nothing gives


def test_images_that_are_no_pixels_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "camera": rng.uniform(0, 1, (16, SIDE, SIDE, 3)).astype(np.float32),
        "state": np.zeros((16, 1), np.float32),
        "action": np.zeros((16, 2), np.float32),
    }
    store = write_demonstrations(tmp_path / "a.zarr", Demonstrations(arrays, np.array([8, 16])))
    with pytest.raises(ConfigError, match=r"'camera' has shape .* say what it is with data\.kinds="):
        pretrain(settings(store), tmp_path / "run")
    declared = settings(store)
    declared["data"] = {**declared["data"], "kinds": {"camera": "image"}}
    with pytest.raises(DataError, match=r"'camera' is an image of torch\.float32; give uint8"):
        pretrain(declared, tmp_path / "run")

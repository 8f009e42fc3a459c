"""An actor file acts as the stable-baselines3 model it was taken from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO, SAC  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

from flowpolicy.errors import CheckpointError  # noqa: E402
from flowpolicy_envs.actor import ActorInfo, ExpertActor, actor_from_sb3  # noqa: E402

ENV_ID = "Pendulum-v1"  # its action bound is 2, so a scale that is forgotten shows
INFO = ActorInfo(ENV_ID, "test", 10, 0, -1.0, 0.5, "a command", {"torch": "2"})


def _model(algorithm: str, normalize: bool) -> tuple[Any, Any]:
    envs: Any = make_vec_env(ENV_ID, n_envs=2, seed=0)
    rms = None
    if normalize:
        envs = VecNormalize(envs)
        envs.reset()
        for _ in range(50):
            envs.step(np.stack([envs.action_space.sample() for _ in range(2)]))
        rms = envs.obs_rms
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [16, 12]}, "seed": 0, "device": "cpu"}
    if algorithm == "ppo":
        kwargs["policy_kwargs"]["log_std_init"] = -0.5
        model: Any = PPO("MlpPolicy", envs, n_steps=8, batch_size=16, **kwargs)
    else:
        model = SAC("MlpPolicy", envs, buffer_size=100, **kwargs)
    with torch.no_grad():  # wide heads, so that actions reach their bounds
        for name, parameter in model.policy.named_parameters():
            if name.endswith(("action_net.weight", "mu.weight")):
                parameter.mul_(100.0 if algorithm == "ppo" else 4.0)
    return model, rms


def _observations(scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((64, 3)) * scale).astype(np.float32)


def _seen_by_sb3(model: Any, rms: Any, observations: np.ndarray) -> np.ndarray:
    return observations if rms is None else model.get_vec_normalize_env().normalize_obs(observations)


CASES = [("ppo", False), ("ppo", True), ("sac", False), ("sac", True)]


@pytest.mark.parametrize(("algorithm", "normalize"), CASES)
@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: beyond the clip of normalised observations
def test_deterministic_actions_equal_sb3s(algorithm: str, normalize: bool, scale: float) -> None:
    model, rms = _model(algorithm, normalize)
    actor = actor_from_sb3(model, rms, INFO)
    observations = _observations(scale)
    expected, _ = model.predict(_seen_by_sb3(model, rms, observations), deterministic=True)
    found = actor.act(observations, np.random.default_rng(0), deterministic=True)
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("algorithm", "normalize"), CASES)
def test_stochastic_actions_have_sb3s_distribution(algorithm: str, normalize: bool) -> None:
    model, rms = _model(algorithm, normalize)
    actor = actor_from_sb3(model, rms, INFO)
    observations = _observations()
    seen = torch.as_tensor(_seen_by_sb3(model, rms, observations), dtype=torch.float32)
    noise = torch.from_numpy(np.random.default_rng(7).standard_normal((64, 1), dtype=np.float32))
    with torch.no_grad():
        if algorithm == "sac":
            mean, log_std, _ = model.policy.actor.get_action_dist_params(seen)
            expected = 2.0 * torch.tanh(mean + log_std.exp() * noise)
        else:
            gaussian = model.policy.get_distribution(seen).distribution
            expected = (gaussian.mean + gaussian.stddev * noise).clamp(-2.0, 2.0)
    found = actor.act(observations, np.random.default_rng(7))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("algorithm", "normalize"), CASES)
def test_a_saved_actor_comes_back(algorithm: str, normalize: bool, tmp_path: Path) -> None:
    model, rms = _model(algorithm, normalize)
    actor = actor_from_sb3(model, rms, INFO)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    actor.save(first)
    loaded = ExpertActor.load(first)
    loaded.save(second)
    again = ExpertActor.load(second)
    assert loaded.info == INFO
    observations = _observations(1.0)
    acted = [a.act(observations, np.random.default_rng(1)) for a in (actor, loaded, again)]
    np.testing.assert_allclose(acted[1], acted[0], atol=0.05)  # weights are stored in half precision
    np.testing.assert_array_equal(acted[2], acted[1])


def test_a_missing_or_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "actor.safetensors"
    with pytest.raises(CheckpointError, match="no actor file"):
        ExpertActor.load(path)
    model, _ = _model("ppo", False)
    actor_from_sb3(model, None, INFO).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged or holds no actor"):
        ExpertActor.load(path)

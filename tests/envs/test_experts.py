"""Training an expert leaves actors at every checkpoint, and goes on where it stopped."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO, SAC  # noqa: E402

from flowpolicy.errors import ConfigError  # noqa: E402
from flowpolicy_envs.actor import ExpertActor  # noqa: E402
from flowpolicy_envs.experts import ExpertConfig, train_expert  # noqa: E402

SMALL = {"policy_kwargs": {"net_arch": [8], "activation_fn": "Tanh"}}
PPO_RECIPE = ExpertConfig(
    "ppo", 128, 2, 64, 1, True, {"n_steps": 32, "batch_size": 32, "n_epochs": 1, **SMALL}
)
SAC_SETTINGS = {
    "buffer_size": 500,
    "learning_starts": 20,
    "batch_size": 8,
    "policy_kwargs": {"net_arch": [8]},
}
SAC_RECIPE = ExpertConfig("sac", 64, 1, 32, 1, False, SAC_SETTINGS)


def _steps(run_dir: Path) -> list[int]:
    with (run_dir / "checkpoints.csv").open() as file:
        return [int(row["steps"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("recipe", "kind"), [(PPO_RECIPE, PPO), (SAC_RECIPE, SAC)], ids=["ppo", "sac"])
def test_a_resumed_run_goes_on(recipe: ExpertConfig, kind: type, tmp_path: Path) -> None:
    half = replace(recipe, total_steps=recipe.total_steps // 2)
    actors = train_expert("Pendulum-v1", half, tmp_path, progress_bar=False)
    before = kind.load(tmp_path / "model.zip", device="cpu")
    assert before.num_timesteps == half.total_steps
    train_expert("Pendulum-v1", recipe, tmp_path, resume=True, progress_bar=False)
    after = kind.load(tmp_path / "model.zip", device="cpu")
    assert after.num_timesteps == recipe.total_steps
    assert after._n_updates > before._n_updates > 0
    if kind is SAC:
        after.load_replay_buffer(tmp_path / "replay_buffer.pkl")
        assert (
            after.replay_buffer.size() == recipe.total_steps
        )  # what was gathered before the stop is still there
    assert _steps(tmp_path) == [half.total_steps, recipe.total_steps]
    files = sorted(actors.glob("*.safetensors"))
    assert [file.stem for file in files] == [f"step_{steps:08d}" for steps in _steps(tmp_path)]
    info = ExpertActor.load(files[-1]).info
    assert (info.env_id, info.steps, info.algorithm) == ("Pendulum-v1", recipe.total_steps, recipe.algorithm)
    assert info.return_mean < 0.0  # Pendulum's rewards are negative: it has been measured
    assert not list(tmp_path.glob("tmp_*"))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    recipe = replace(PPO_RECIPE, total_steps=64)
    train_expert("Pendulum-v1", recipe, tmp_path, progress_bar=False)
    content = (tmp_path / "model.zip").read_bytes()
    train_expert("Pendulum-v1", recipe, tmp_path, resume=True, progress_bar=False)
    assert (tmp_path / "model.zip").read_bytes() == content
    assert _steps(tmp_path) == [64]
    with pytest.raises(ConfigError, match="resume=true"):
        train_expert("Pendulum-v1", recipe, tmp_path, progress_bar=False)


def test_equal_seeds_train_equal_actors(tmp_path: Path) -> None:
    acted = []
    recipe = replace(PPO_RECIPE, total_steps=64)
    for name in ("a", "b"):
        actors = train_expert("Pendulum-v1", recipe, tmp_path / name, seed=3, progress_bar=False)
        actor = ExpertActor.load(actors / "step_00000064.safetensors")
        acted.append(actor.act(np.ones((4, 3), np.float32), np.random.default_rng(0)))
    np.testing.assert_array_equal(*acted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "sak"}, "did you mean 'sac'"),
        ({"total_steps": 0}, r"env\.expert\.total_steps is 0; it must be at least 1"),
    ],
)
def test_bad_recipes_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertConfig(**values)


def test_settings_that_sb3_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rat"):
        train_expert("Pendulum-v1", replace(PPO_RECIPE, settings={"learning_rat": 1}), tmp_path)
    bad = {"policy_kwargs": {"activation_fn": "Relu"}}
    with pytest.raises(ConfigError, match="ReLU or Tanh"):
        train_expert("Pendulum-v1", replace(PPO_RECIPE, settings=bad), tmp_path)

"""Collected stores are valid, repeatable, made of whole episodes, and say how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("zarr")
pytest.importorskip("mujoco")

from flowpolicy.data.store import read_demonstrations  # noqa: E402
from flowpolicy.errors import ConfigError, DataError  # noqa: E402
from flowpolicy_envs.actor import ActorInfo, ExpertActor  # noqa: E402
from flowpolicy_envs.collection import collect, collect_store, resolve_actors  # noqa: E402
from flowpolicy_envs.rollouts import episode_returns, run_episodes  # noqa: E402

ENV_ID = "InvertedPendulum-v5"


def _actor(gain: float, env_id: str = ENV_ID, size: int = 4) -> ExpertActor:
    """Pushes against the pole's angle (the second of four observations); a larger gain balances longer."""
    mean = torch.zeros(1, size)
    mean[0, 1] = gain
    tensors = {
        "obs_mean": torch.zeros(size),
        "obs_std": torch.ones(size),
        "mean.weight": mean,
        "mean.bias": torch.zeros(1),
        "log_std": torch.full((1,), -1.0),
        "action_low": torch.full((1,), -3.0),
        "action_high": torch.full((1,), 3.0),
    }
    return ExpertActor(tensors, "tanh", "clip", ActorInfo(env_id, "ppo", 7, 0, 0.0, 0.0, "made by hand", {}))


@pytest.fixture
def actors_dir(tmp_path: Path) -> Path:
    _actor(3.0).save(tmp_path / "actors" / "step_00000100.safetensors")
    _actor(9.0).save(tmp_path / "actors" / "step_00000200.safetensors")
    return tmp_path / "actors"


def _env(**medium: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "env_id": ENV_ID,
        "env_kwargs": {"max_episode_steps": 50},
        "control_hz": 25.0,
        "medium": {"actors": [], **medium},
    }


def _collect(actors_dir: Path, out: Path, env: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    options = {"level": "medium", "steps": 200, "actors": [100, 200], "num_envs": 3, "seed": 5, **kwargs}
    return collect_store(env or _env(), out=out, actors_dir=actors_dir, **options)


def test_a_store_holds_whole_episodes_and_its_recipe(actors_dir: Path, tmp_path: Path) -> None:
    path, _ = _collect(actors_dir, tmp_path / "toy.zarr.zip", _env(band=[1, 60]), command="the command")
    demos = read_demonstrations(path)
    assert set(demos.arrays) == {"observation", "action", "reward", "terminated", "truncated"}
    assert demos.arrays["observation"].dtype == demos.arrays["action"].dtype == np.float32
    last = demos.episode_ends - 1
    ended = demos.arrays["terminated"] | demos.arrays["truncated"]
    assert np.flatnonzero(ended).tolist() == last.tolist()
    assert not (demos.arrays["terminated"] & demos.arrays["truncated"]).any()
    assert (demos.episode_lengths[demos.arrays["truncated"][last]] == 50).all()
    attributes = demos.attributes
    assert attributes["return_mean"] == pytest.approx(demos.episode_returns.mean())
    assert attributes["licence"] == "MIT (this repository)"
    assert (attributes["level"], attributes["band"], attributes["command"]) == (
        "medium",
        [1, 60],
        "the command",
    )
    assert {"gymnasium", "mujoco", "torch"} <= set(attributes["versions"])
    shares = [entry["steps"] for entry in attributes["actors"]]
    assert sum(shares) == demos.num_steps
    assert all(100 <= share < 150 for share in shares)
    assert [entry["name"] for entry in attributes["actors"]] == ["100", "200"]


def test_recorded_actions_replay_to_recorded_observations(actors_dir: Path, tmp_path: Path) -> None:
    _, demos = _collect(actors_dir, tmp_path / "toy.zarr")
    env = gymnasium.make(ENV_ID)
    entry = demos.attributes["actors"][1]
    episode = demos.attributes["actors"][0]["episodes"]
    for offset in range(min(3, entry["episodes"])):
        rows = slice(demos.episode_starts[episode + offset], demos.episode_ends[episode + offset])
        observation, _ = env.reset(seed=entry["first_seed"] + offset)
        for step in range(rows.start, rows.stop):
            np.testing.assert_allclose(observation, demos.arrays["observation"][step], atol=1e-5)
            observation, reward, terminated, _, _ = env.step(demos.arrays["action"][step])
            assert reward == pytest.approx(demos.arrays["reward"][step], abs=1e-5)
            assert terminated == demos.arrays["terminated"][step]


def test_equal_seeds_give_equal_stores(actors_dir: Path, tmp_path: Path) -> None:
    first, second, other = (
        _collect(actors_dir, tmp_path / f"{i}.zarr", seed=seed)[1] for i, seed in enumerate((5, 5, 6))
    )
    np.testing.assert_array_equal(first.arrays["action"], second.arrays["action"])
    assert not np.array_equal(first.arrays["action"][:10], other.arrays["action"][:10])


def test_a_return_outside_the_band_is_refused(actors_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy.zarr"
    with pytest.raises(DataError, match=r"outside the medium band \[900, 1000\]; name later checkpoints"):
        _collect(actors_dir, out, _env(band=[900, 1000]))
    with pytest.raises(DataError, match="name earlier checkpoints"):
        _collect(actors_dir, out, _env(band=[0, 1]))
    assert not out.exists()
    _collect(actors_dir, out, _env(band=[900, 1000]), allow_outside_band=True)
    assert read_demonstrations(out).attributes["band"] == [900, 1000]
    with pytest.raises(DataError, match="exists already"):
        _collect(actors_dir, out)


def test_rolling_out_side_by_side_changes_no_episode() -> None:
    actor = _actor(9.0)
    together = episode_returns(actor, ENV_ID, 4, seed=0, deterministic=True)
    alone = [episode_returns(actor, ENV_ID, 1, seed=seed, deterministic=True)[0] for seed in range(4)]
    assert len(set(alone)) > 1
    np.testing.assert_array_equal(together, alone)
    (episode,) = run_episodes(
        actor, [gymnasium.make(ENV_ID)], [0], np.random.default_rng(0), deterministic=True
    )
    assert episode.total == alone[0]


def test_actors_are_found_or_refused_by_name(actors_dir: Path) -> None:
    assert list(resolve_actors("toy", ["100", "step_00000200"], actors_dir)) == ["100", "step_00000200"]
    with pytest.raises(ConfigError, match="it has step_00000100, step_00000200"):
        resolve_actors("toy", ["300"], actors_dir)
    with pytest.raises(ConfigError, match=r"train one with flowpolicy train-expert env=toy"):
        resolve_actors("toy", ["medium-a"])
    with pytest.raises(ConfigError, match="No actor is named"):
        resolve_actors("toy", [])
    with pytest.raises(ConfigError, match="once"):
        resolve_actors("toy", ["100", "100"], actors_dir)


def test_an_actor_of_another_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained on Hopper-v5"):
        collect({"a": _actor(1.0, "Hopper-v5")}, ENV_ID, 10)
    with pytest.raises(ConfigError, match="steps is 0"):
        collect({"a": _actor(1.0)}, ENV_ID, 0)


def test_a_flag_that_is_never_set_survives_the_disk(actors_dir: Path, tmp_path: Path) -> None:
    env = {**_env(), "env_kwargs": {"max_episode_steps": 3}}  # too short to fall over
    path, _ = _collect(actors_dir, tmp_path / "toy.zarr.zip", env, steps=30)
    demos = read_demonstrations(path)
    assert not demos.arrays["terminated"].any()
    assert demos.arrays["truncated"].sum() == demos.num_episodes


def test_the_old_name_of_a_scripted_expert_is_answered_with_the_new_one(tmp_path: Path) -> None:
    env = {**_env(), "scripted": {"demonstrator": "my_package:MyScript"}}
    with pytest.raises(ConfigError, match=r"called env\.scripted\.expert now"):
        collect_store(env, level="scripted", out=tmp_path / "toy.zarr.zip")

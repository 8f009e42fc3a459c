"""Kitchen: recordings of both layouts give what the environment observes, and the score counts tasks done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("gymnasium_robotics")
h5py = pytest.importorskip("h5py")

from flowpolicy.data.importers import import_demonstrations  # noqa: E402
from flowpolicy.errors import ConfigError, DataError  # noqa: E402

ENV_ID = "flowpolicy_envs:flowpolicy/FrankaKitchen-v0"
TRANSFORM = "flowpolicy_envs.kitchen:keep_positions"
LENGTHS = (6, 9)


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    exact = {"robot_noise_ratio": 0.0, "object_noise_ratio": 0.0}
    made = gymnasium.make(ENV_ID, tasks=["microwave", "kettle"], **exact)
    yield made
    made.close()


@pytest.fixture(scope="module")
def episodes(env: Any) -> list[dict[str, Any]]:
    """Random motions: what the simulator says, as recordings keep it, and what the environment says."""
    rng = np.random.default_rng(0)
    played = []
    for seed, length in enumerate(LENGTHS):
        seen = [env.reset(seed=seed)[0]]
        raw = [_raw(env)]
        actions = rng.uniform(-1, 1, (length, 9)).astype(np.float32)
        for action in actions:
            seen.append(env.step(action)[0])
            raw.append(_raw(env))
        played.append({"action": actions, "seen": np.stack(seen), "raw": np.stack(raw)})
    return played


def _raw(env: Any) -> np.ndarray:
    data = env.unwrapped.data
    return np.concatenate([data.qpos[:9], data.qvel[:9], data.qpos[9:], data.qvel[9:]])


def test_the_declared_safe_action_holds_the_arm_where_zero_lets_it_sag(env, repo_root):
    declared = yaml.safe_load((repo_root / "configs" / "env" / "franka_kitchen.yaml").read_text())[
        "safe_action"
    ]
    moved = {}
    for name, action in (("declared", np.array(declared, np.float32)), ("zero", np.zeros(9, np.float32))):
        env.reset(seed=0)
        env.step(action)
        before = _raw(env)[:7]
        for _ in range(25):  # two seconds
            env.step(action)
        moved[name] = float(np.abs(_raw(env)[:7] - before).max())
    assert moved["declared"] < 0.06 < 0.25 < moved["zero"]


def _minari(path: Path, episodes: list[dict[str, Any]]) -> Path:
    with h5py.File(path, "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            steps = len(episode["action"])
            group["actions"] = episode["action"]
            group["rewards"] = np.zeros(steps)
            group["terminations"] = np.zeros(steps, bool)
            group["truncations"] = np.arange(steps) == steps - 1
            group["observations/observation"] = episode["raw"]
            for goal in ("achieved_goal", "desired_goal"):
                group[f"observations/{goal}/kettle"] = np.zeros((steps + 1, 7))
                group[f"observations/{goal}/bottom burner"] = np.zeros((steps + 1, 2))
    return path


def _d4rl(path: Path, episodes: list[dict[str, Any]]) -> Path:
    rows = np.concatenate([episode["raw"][:-1] for episode in episodes])
    positions = np.concatenate([rows[:, :9], rows[:, 18:39]], axis=1)
    ends = np.cumsum([len(episode["action"]) for episode in episodes]) - 1
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([positions, np.ones((len(rows), 30))], axis=1)
        file["actions"] = np.concatenate([episode["action"] for episode in episodes])
        file["rewards"] = np.zeros(len(rows))
        file["terminals"] = np.isin(np.arange(len(rows)), ends)
        file["timeouts"] = np.zeros(len(rows), bool)
    return path


@pytest.mark.parametrize("write", [_minari, _d4rl])
def test_recordings_give_what_the_environment_observes(
    write: Callable[..., Path], episodes: list[dict[str, Any]], tmp_path: Path
) -> None:
    demos = import_demonstrations(write(tmp_path / "main_data.hdf5", episodes), demo_transform=TRANSFORM)
    assert tuple(demos.episode_lengths) == LENGTHS
    assert set(demos.arrays) <= {"observation", "action", "reward", "terminated", "truncated"}
    seen = np.concatenate([episode["seen"][:-1] for episode in episodes])
    assert demos.arrays["observation"].shape == (sum(LENGTHS), 30)
    np.testing.assert_allclose(demos.arrays["observation"], seen, atol=1e-6)
    np.testing.assert_array_equal(
        demos.arrays["action"], np.concatenate([episode["action"] for episode in episodes])
    )


def test_other_rows_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"], file["actions"] = np.zeros((4, 31)), np.zeros((4, 9))
        file["terminals"] = np.arange(4) == 3
    with pytest.raises(DataError, match=r"shape \(4, 31\); rows of 59 .* or 60"):
        import_demonstrations(tmp_path / "other.hdf5", demo_transform=TRANSFORM)


def test_the_score_counts_tasks_and_all_of_them_are_success(env: Any) -> None:
    env.reset(seed=0)
    still = np.zeros(9, np.float32)
    assert env.step(still)[4]["score"] == 0.0
    data = env.unwrapped.data
    data.qpos[22] = -0.75  # the microwave stands open
    _, reward, terminated, _, info = env.step(still)
    assert (reward, terminated, info["score"], info["success"]) == (1.0, False, 1.0, False)
    data.qpos[22] = 0.0  # closed again: it was done all the same
    data.qpos[23:30] = [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]
    _, reward, terminated, _, info = env.step(still)
    assert (reward, terminated, info["score"], info["success"]) == (1.0, True, 2.0, True)
    kept = info["episode_task_completions"]
    _, info = env.reset(seed=1)
    assert (info["score"], info["success"], sorted(kept)) == (0.0, False, ["kettle", "microwave"])


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="some of bottom burner"):
        gymnasium.make(ENV_ID, tasks=["toaster"])

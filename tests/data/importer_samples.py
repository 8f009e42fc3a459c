"""Small valid files of every format, all holding the same episodes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

Episodes = list[dict[str, np.ndarray]]


def make_episodes(lengths: tuple[int, ...] = (6, 11, 4), seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    return [
        {
            "observation": rng.normal(size=(n, 3)).astype(np.float32),
            "action": rng.uniform(-1, 1, size=(n, 2)).astype(np.float32),
            "reward": rng.normal(size=n).astype(np.float32),
        }
        for n in lengths
    ]


def write_diffusion_policy(folder: Path, episodes: Episodes) -> Path:
    import zarr

    path = folder / "sample.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    data, meta = group.create_group("data"), group.create_group("meta")
    for key in episodes[0]:
        values = np.concatenate([episode[key] for episode in episodes])
        data.create_array(key, shape=values.shape, dtype=values.dtype, chunks=(5, *values.shape[1:]))[...] = (
            values
        )
    ends = np.cumsum([len(episode["action"]) for episode in episodes])
    meta.create_array("episode_ends", shape=ends.shape, dtype=ends.dtype)[...] = ends
    return path


def write_robomimic(folder: Path, episodes: Episodes) -> Path:
    import h5py

    path = folder / "sample.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Toy", "type": 1})
        for i, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{i}")
            demo["actions"], demo["rewards"] = episode["action"].astype(np.float64), episode["reward"]
            demo["dones"] = np.arange(len(episode["reward"])) == len(episode["reward"]) - 1
            demo["states"] = np.repeat(episode["observation"], 2, axis=1)
            demo["obs/observation"] = episode["observation"].astype(np.float64)
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
    return path


def write_minari(folder: Path, episodes: Episodes) -> Path:
    import h5py

    path = folder / "sample" / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            after = np.concatenate([episode["observation"], episode["observation"][:1]])
            group["observations"], group["actions"], group["rewards"] = (
                after,
                episode["action"],
                episode["reward"],
            )
            group["terminations"] = np.zeros(len(episode["reward"]), bool)
            group["truncations"] = np.arange(len(episode["reward"])) == len(episode["reward"]) - 1
    space = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
    metadata = {
        "dataset_id": "toy/sample-v0",
        "total_episodes": len(episodes),
        "total_steps": sum(len(episode["reward"]) for episode in episodes),
        "action_space": json.dumps(space),
        "env_spec": json.dumps({"id": "Toy-v0"}),
    }
    (path.parent / "metadata.json").write_text(json.dumps(metadata))
    return folder / "sample"


def write_d4rl(folder: Path, episodes: Episodes) -> Path:
    import h5py

    path = folder / "sample.h5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([episode["observation"] for episode in episodes])
        file["actions"] = np.concatenate([episode["action"] for episode in episodes])
        file["rewards"] = np.concatenate([episode["reward"] for episode in episodes])
        ends = np.cumsum([len(episode["action"]) for episode in episodes]) - 1
        timeouts = np.zeros(int(ends[-1]) + 1, bool)
        timeouts[ends[::2]] = True
        terminals = np.zeros_like(timeouts)
        terminals[ends[1::2]] = True
        file["timeouts"], file["terminals"] = timeouts, terminals
    return path


def write_adroit(folder: Path, episodes: Episodes) -> Path:
    path = folder / "sample.pickle"
    content = [
        {
            "observations": episode["observation"].astype(np.float64),
            "actions": episode["action"].astype(np.float64),
            "rewards": episode["reward"].astype(np.float64),
            "init_state_dict": {"qpos": np.zeros(4), "count": np.float64(2.0)},
        }
        for episode in episodes
    ]
    path.write_bytes(pickle.dumps(content, protocol=3))
    return path


def write_lerobot(folder: Path, episodes: Episodes) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "sample_lerobot"
    (path / "meta").mkdir(parents=True)
    (path / "data" / "chunk-000").mkdir(parents=True)
    steps = sum(len(episode["action"]) for episode in episodes)
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "robot_type": "toy",
        "total_episodes": len(episodes),
        "total_frames": steps,
        "features": {"action": {"dtype": "float32", "shape": [2]}, "observation.image": {"dtype": "video"}},
    }
    (path / "meta" / "info.json").write_text(json.dumps(info))
    for i, episode in enumerate(episodes):
        n = len(episode["action"])
        table = pa.table(
            {
                "observation.state": list(episode["observation"]),
                "action": list(episode["action"]),
                "next.reward": episode["reward"],
                "episode_index": np.full(n, i),
                "frame_index": np.arange(n),
                "timestamp": np.arange(n) / 10,
            }
        )
        pq.write_table(table, path / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
    return path


def write_aloha(folder: Path, episodes: Episodes) -> Path:
    """ACT's layout: one file an episode, joint positions and cameras under ``observations``."""
    import h5py

    path = folder / "sample_aloha"
    path.mkdir()
    for i, episode in enumerate(episodes):
        with h5py.File(path / f"episode_{i}.hdf5", "w") as file:
            file.attrs["sim"] = True
            file["action"] = episode["action"]
            file["observations/qpos"] = episode["observation"]
            file["observations/qvel"] = 2 * episode["observation"]
            frames = np.full((len(episode["action"]), 16, 12, 3), i, np.uint8)
            file.create_dataset("observations/images/top", data=frames, chunks=(1, 16, 12, 3))
    return path


def write_maniskill(folder: Path, episodes: Episodes) -> Path:
    """ManiSkill's layout: observations with one row more than there are actions, and a JSON file."""
    import h5py

    path = folder / "sample_trajectory.h5"
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            steps = len(episode["action"])
            group = file.create_group(f"traj_{i}")
            group["actions"], group["rewards"] = episode["action"], episode["reward"]
            after = np.concatenate([episode["observation"], episode["observation"][:1]])
            group["obs"] = after
            group["env_states/actors/cube"] = np.zeros((steps + 1, 13), np.float32)
            group["terminated"] = group["success"] = np.arange(steps) == steps - 1
            group["truncated"] = np.zeros(steps, bool)
    about = {"env_info": {"env_id": "PickCube-v1", "env_kwargs": {}}, "episodes": [{"episode_id": 0}]}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


WRITERS: dict[str, Callable[[Path, Episodes], Path]] = {
    "diffusion_policy": write_diffusion_policy,
    "robomimic": write_robomimic,
    "minari": write_minari,
    "d4rl": write_d4rl,
    "adroit": write_adroit,
    "lerobot": write_lerobot,
    "aloha": write_aloha,
    "maniskill": write_maniskill,
}
OBSERVATION = {"aloha": "qpos"}
"""What the samples' observation is called by formats that do not call it ``observation``."""

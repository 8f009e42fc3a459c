"""A robomimic file that is written here says the same to this package's reader and to robomimic's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.sampling import ChunkSampler, as_tensors
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.errors import DataError
from flowpolicy.pretraining.config import DataConfig
from flowpolicy.pretraining.stores import split_episodes

h5py = pytest.importorskip("h5py")


def test_a_round_trip_gives_the_episodes_back(demos: Demonstrations, tmp_path: Path) -> None:
    demos.arrays["states"] = np.arange(2.0 * demos.num_steps, dtype=np.float32).reshape(-1, 2)
    demos.arrays["task_index"], demos.attributes["tasks"] = (
        np.arange(demos.num_steps) % 2,
        ["lift it — gently", "b"],
    )
    path = write_robomimic(tmp_path / "out.hdf5", demos)
    back = import_demonstrations(path)
    assert back.attributes["tasks"] == demos.attributes["tasks"]
    np.testing.assert_array_equal(back.episode_ends, demos.episode_ends)
    for key in ("observation", "goal", "action", "reward", "states", "task_index"):
        np.testing.assert_array_equal(back.arrays[key], demos.arrays[key])
    assert np.flatnonzero(back.arrays["done"]).tolist() == (demos.episode_ends - 1).tolist()
    with pytest.raises(DataError, match="exists already"):
        write_robomimic(path, demos)


def test_the_layout_is_robomimics(demos: Demonstrations, tmp_path: Path) -> None:
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": "Panda"}}
    path = write_robomimic(tmp_path / "out.hdf5", demos, env_args=env_args, validation_fraction=0.25)
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == demos.num_steps
        assert json.loads(file["data"].attrs["env_args"]) == env_args
        assert [file[f"data/demo_{i}"].attrs["num_samples"] for i in range(4)] == list(demos.episode_lengths)
        masks = {name: {entry.decode() for entry in file[f"mask/{name}"]} for name in ("train", "valid")}
    assert len(masks["valid"]) == 1
    assert masks["train"] | masks["valid"] == {f"demo_{i}" for i in range(4)}
    assert not masks["train"] & masks["valid"]


def test_masks_are_kept_and_decide_what_is_held_out(demos: Demonstrations, tmp_path: Path) -> None:
    demos.attributes["masks"] = {"train": [0, 1, 3], "valid": [2]}
    imported = import_demonstrations(write_robomimic(tmp_path / "out.hdf5", demos))
    stored = read_demonstrations(write_demonstrations(tmp_path / "out.zarr.zip", imported))
    assert stored.masks == {"train": [0, 1, 3], "valid": [2]}
    train, held_out = split_episodes(stored, DataConfig(validation_mask="valid"), seed=0)
    assert (sorted(train), held_out) == ([0, 1, 3], [2])
    assert stored.select_episodes([3, 2]).masks == {"train": [0], "valid": [1]}
    with pytest.raises(DataError, match=r"no mask 'test' \(it has train, valid\)"):
        split_episodes(stored, DataConfig(validation_mask="test"), seed=0)
    stored.attributes["masks"] = {"valid": [9]}
    with pytest.raises(DataError, match="from 0 to 3"):
        split_episodes(stored, DataConfig(validation_mask="valid"), seed=0)


def test_nothing_half_written_stays(demos: Demonstrations, tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise DataError("in the middle")

    monkeypatch.setattr("flowpolicy.data.robomimic_writing._episode", fails)
    with pytest.raises(DataError, match="in the middle"):
        write_robomimic(tmp_path / "out.hdf5", demos)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("obs_horizon", "action_horizon"), [(1, 1), (2, 8), (3, 16)])
def test_chunks_equal_robomimics_own_sequences(
    demos: Demonstrations, tmp_path: Path, obs_horizon: int, action_horizon: int
) -> None:
    pytest.importorskip("robomimic", reason="robomimic is not installed (extra 'robomimic')")
    from robomimic.utils import obs_utils
    from robomimic.utils.dataset import SequenceDataset

    demos.arrays["goal"] = demos.arrays["goal"].reshape(demos.num_steps, -1)
    path = write_robomimic(tmp_path / "out.hdf5", demos)
    keys = ["goal", "observation"]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys, "rgb": []}})
    theirs = SequenceDataset(
        hdf5_path=str(path),
        obs_keys=keys,
        dataset_keys=["actions"],
        frame_stack=obs_horizon,
        seq_length=action_horizon,
        pad_frame_stack=True,
        pad_seq_length=True,
        get_pad_mask=True,
        load_next_obs=False,
        hdf5_cache_mode="all",
    )
    ours = ChunkSampler(
        as_tensors(demos, keys, "cpu"),
        torch.from_numpy(demos.arrays["action"]),
        demos.episode_ends,
        obs_horizon,
        action_horizon,
    )
    assert len(ours) == len(theirs) == demos.num_steps
    batch = ours.batch(torch.arange(len(ours)))
    for number in range(len(theirs)):
        window = theirs[number]
        for key in keys:
            np.testing.assert_array_equal(batch.observation[key][number], window["obs"][key][:obs_horizon])
        actions = slice(
            obs_horizon - 1, obs_horizon - 1 + action_horizon
        )  # theirs begin with the first frame
        np.testing.assert_array_equal(batch.action[number], window["actions"][actions])
        np.testing.assert_array_equal(batch.mask[number], window["pad_mask"][actions, 0])
    theirs.close_and_delete_hdf5_handle()

"""A robomimic file that is written here says the same to this package's reader and to robomimic's own."""

from __future__ import annotations

import dataclasses
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


def test_the_layout_is_robomimics(demos: Demonstrations, tmp_path: Path) -> None:
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": "Panda"}}
    path = write_robomimic(tmp_path / "out.hdf5", demos, env_args=env_args, validation_fraction=0.25)
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == demos.num_steps
        assert json.loads(file["data"].attrs["env_args"]) == env_args
        assert [file[f"data/demo_{i}"].attrs["num_samples"] for i in range(4)] == list(demos.episode_lengths)
        for i, length in enumerate(demos.episode_lengths):
            assert np.flatnonzero(file[f"data/demo_{i}/dones"]).tolist() == [length - 1]
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
    with pytest.raises(DataError, match=r"a/b.* has a slash"):
        write_robomimic(tmp_path / "b.hdf5", dataclasses.replace(demos, attributes={"masks": {"a/b": [0]}}))
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

    whole, steps = demos, demos.num_steps
    whole.arrays["goal"] = whole.arrays["goal"].reshape(steps, -1)
    whole.arrays["camera"] = np.random.default_rng(0).integers(0, 256, (steps, 8, 10, 3), np.uint8)
    whole.arrays["task_index"] = np.arange(steps) % 2
    whole.attributes |= {"tasks": ["lift it — gently", "push"], "masks": {"train": [0, 1, 3], "valid": [2]}}
    path, demos = write_robomimic(tmp_path / "out.hdf5", whole), whole.select_episodes([0, 1, 3])
    keys = ["goal", "observation", "camera"]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys[:2], "rgb": keys[2:]}})
    theirs = SequenceDataset(
        hdf5_path=str(path),
        obs_keys=keys,
        dataset_keys=["actions", "rewards", "task_index"],
        filter_by_attribute="train",
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
        np.testing.assert_array_equal(demos.arrays["reward"][number], window["rewards"][obs_horizon - 1])
        np.testing.assert_array_equal(
            demos.arrays["task_index"][number], window["task_index"][obs_horizon - 1]
        )
    theirs.close_and_delete_hdf5_handle()

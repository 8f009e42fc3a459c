"""Every format gives back the episodes that were written in it, whatever the route."""

from __future__ import annotations

import fnmatch
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from importer_samples import OBSERVATION

from flowpolicy.data.importers import FORMATS, detect_format, import_demonstrations
from flowpolicy.data.importers.restricted_pickle import load_arrays
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import ConfigError, DataError

for module in ("zarr", "h5py", "pyarrow"):
    pytest.importorskip(module)


def assert_same(demos: Demonstrations, episodes: list[dict[str, np.ndarray]]) -> None:
    assert list(demos.episode_lengths) == [len(episode["action"]) for episode in episodes]
    for key in ("observation", "action", "reward"):
        wanted = np.concatenate([episode[key] for episode in episodes])
        assert demos.arrays[key].dtype == np.float32
        np.testing.assert_array_equal(demos.arrays[key].reshape(wanted.shape), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_with_the_format_detected(name: str, write_sample: Callable[..., Path], episodes):
    path = write_sample(name)
    assert detect_format(path) == name
    demos = import_demonstrations(path)
    demos.arrays.setdefault("observation", demos.arrays.get(OBSERVATION.get(name, ""), np.zeros(0)))
    if name == "aloha":  # which records no rewards
        demos.arrays["reward"] = np.concatenate([episode["reward"] for episode in episodes])
    assert_same(demos, episodes)
    assert demos.attributes["imported_format"] == name


def test_demonstrations_come_in_numeric_order(write_sample: Callable[..., Path]):
    lengths = range(2, 14)  # demo_10 and demo_11 sort before demo_2 as text
    many = [
        {"observation": np.full((n, 1), n), "action": np.zeros((n, 1)), "reward": np.zeros(n)}
        for n in lengths
    ]
    for name in ("robomimic", "minari"):
        demos = import_demonstrations(write_sample(name, many), name)
        assert list(demos.episode_lengths) == list(lengths)
    assert demos.arrays["observation"][-1, 0] == 13


def test_robomimic_keeps_states_dones_and_environment(write_sample: Callable[..., Path], episodes):
    demos = import_demonstrations(write_sample("robomimic"))
    assert demos.arrays["states"].shape == (21, 6)
    assert list(np.flatnonzero(demos.arrays["done"])) == [5, 16, 20]
    assert demos.attributes["env_args"] == {"env_name": "Toy", "type": 1}
    subset = import_demonstrations(write_sample("robomimic"), options={"filter_key": "train"})
    assert_same(subset, [episodes[0], episodes[2]])


def test_robosuite_states_are_the_observation(shared_data: Path):
    demos = import_demonstrations(shared_data / "robosuite_lift_human" / "demo.hdf5")
    assert list(demos.episode_lengths) == [482, 510, 392]
    assert demos.arrays["observation"].shape == (1384, 32)
    assert demos.arrays["action"].shape == (1384, 7)
    assert demos.attributes["env_id"] == "Lift"


def test_minari_dictionary_observations(tmp_path: Path):
    import h5py

    path = tmp_path / "main_data.hdf5"
    with h5py.File(path, "w") as file:
        for i in range(2):
            group = file.create_group(f"episode_{i}")
            group["actions"] = np.zeros((4, 2))
            group["observations/achieved"] = np.arange(5.0)[:, None] + 10 * i
            group["observations/nested/goal"] = np.ones((5, 3))
    demos = import_demonstrations(path)
    np.testing.assert_array_equal(demos.arrays["achieved"].ravel(), [0, 1, 2, 3, 10, 11, 12, 13])
    assert demos.arrays["nested.goal"].shape == (8, 3)


def test_minari_id_goes_through_the_package(write_sample: Callable[..., Path], episodes, monkeypatch):
    stored = write_sample("minari") / "data"
    asked = []

    def load_dataset(name: str, download: bool):
        asked.append((name, download))
        return types.SimpleNamespace(storage=types.SimpleNamespace(data_path=stored))

    monkeypatch.setitem(sys.modules, "minari", types.SimpleNamespace(load_dataset=load_dataset))
    assert_same(import_demonstrations("toy/sample-v0", "minari", options={"download": True}), episodes)
    assert asked == [("toy/sample-v0", True)]


def test_minari_bounds_are_checked(write_sample: Callable[..., Path], episodes):
    episodes[1]["action"][3, 0] = 1.5
    with pytest.raises(DataError, match=r"leaves its bounds \[-1, 1\] in 1 steps \(first at step 9\)"):
        import_demonstrations(write_sample("minari", episodes))


def test_lerobot_id_is_fetched_from_the_hub(
    write_sample: Callable[..., Path], episodes, monkeypatch, tmp_path
):
    """Of a repository whose large videos nobody reads, the tables and their description alone."""
    repository = write_sample("lerobot")
    (repository / "videos").mkdir()
    (repository / "videos" / "camera.mp4").write_bytes(b"film")

    def snapshot_download(repo_id: str, repo_type: str, allow_patterns: list[str]) -> str:
        if (repo_id, repo_type) != ("toy/sample", "dataset"):
            raise RuntimeError("404: a long page of the server's")
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.chdir(tmp_path)
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same(import_demonstrations("toy/sample", "lerobot"), episodes)
    assert not list(tmp_path.rglob("cache/**/*.mp4"))
    with pytest.raises(DataError, match="toy/nothing is neither a folder nor a dataset") as refused:
        import_demonstrations("toy/nothing", "lerobot")
    assert "404" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"flowpolicy\[hub\]"):
        import_demonstrations("toy/sample", "lerobot")


def test_lerobot_version_3_keeps_several_episodes_in_a_file(write_sample: Callable[..., Path], episodes):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = write_sample("lerobot")
    files = sorted((folder / "data").rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file, partitioning=None) for file in reversed(files)])
    for file in files:
        file.unlink()
    pq.write_table(table, folder / "data" / "chunk-000" / "file-000.parquet")
    assert_same(import_demonstrations(folder), episodes)  # in the order of episodes, not of rows


def test_lerobot_says_that_a_camera_without_a_shape_is_left_out(write_sample: Callable[..., Path], caplog):
    import_demonstrations(write_sample("lerobot"))
    assert "declares no shape of images); left out: observation.image" in caplog.text


def test_d4rl_flags_and_last_episode(tmp_path: Path):
    import h5py

    path = tmp_path / "flat.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = np.zeros((10, 2)), np.zeros((10, 1))
        file["terminals"] = np.arange(10) == 2
        file["timeouts"] = np.arange(10) == 6
    demos = import_demonstrations(path)
    assert list(demos.episode_ends) == [3, 7, 10]
    assert list(np.flatnonzero(demos.arrays["terminated"])) == [2]
    assert list(np.flatnonzero(demos.arrays["truncated"])) == [6, 9]
    shorter = import_demonstrations(path, options={"episode_length": 2})
    assert list(shorter.episode_lengths) == [2, 1, 2, 2, 2, 1]
    assert list(np.flatnonzero(shorter.arrays["terminated"])) == [2]


def test_adroit_clips_and_counts(write_sample: Callable[..., Path], episodes, caplog):
    episodes[0]["action"][2] = [3.0, -1.5]
    caplog.set_level("INFO")
    demos = import_demonstrations(write_sample("adroit", episodes))
    assert list(demos.arrays["action"][2]) == [1.0, -1.0]
    assert demos.attributes["actions_clipped"] == 2
    assert "2 of 42 action entries" in caplog.text


def test_real_door_demonstrations(shared_data: Path):
    demos = import_demonstrations(shared_data / "adroit_door_human" / "door-v0_demos.pickle")
    assert (demos.num_episodes, demos.num_steps) == (25, 6729)
    assert demos.arrays["observation"].shape == (6729, 39)
    assert round(100 * demos.attributes["actions_clipped"] / demos.arrays["action"].size, 1) == 5.6
    np.testing.assert_allclose(demos.episode_returns[[0, 2]], [504, 746], atol=1)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8, bool, ">f4"])
def test_restricted_unpickler_agrees_with_pickle(tmp_path: Path, protocol: int, dtype):
    array = (np.arange(24).reshape(2, 3, 4) % 2).astype(dtype)
    content = {
        "c": array,
        "f": np.asfortranarray(array),
        "nested": [(array[0, 0, 1], "text", 3, None)],
        "e": array[:0],
    }
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    back = load_arrays(path)
    for key in ("c", "f", "e"):
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(back[key], content[key])
    assert back["nested"] == content["nested"]


def test_rename_concatenate_transform_select_in_this_order(write_sample: Callable[..., Path], episodes):
    steps = types.ModuleType("toy_transform")
    steps.double = lambda arrays: {**arrays, "both": 2 * arrays["both"], "extra": arrays["action"]}  # type: ignore[attr-defined]
    sys.modules["toy_transform"] = steps
    try:
        demos = import_demonstrations(
            write_sample("robomimic"),
            rename={"observation": "state"},
            concatenate={"both": ["state", "states"]},
            demo_transform="toy_transform:double",
            keys=["both"],
        )
    finally:
        del sys.modules["toy_transform"]
    assert set(demos.arrays) == {"action", "reward", "both"}
    observation = np.concatenate([episode["observation"] for episode in episodes])
    np.testing.assert_array_equal(demos.arrays["both"][:, :3], 2 * observation)
    assert demos.arrays["both"].shape == (21, 9)


def test_out_of_bounds_is_refused_or_clipped(write_sample: Callable[..., Path]):
    path = write_sample("d4rl")
    with pytest.raises(DataError, match="out_of_bounds=clip"):
        import_demonstrations(path, action_bounds=[-0.1, 0.1])
    clipped = import_demonstrations(path, action_bounds=[-0.1, 0.1], out_of_bounds="clip")
    assert np.abs(clipped.arrays["action"]).max() == np.float32(0.1)
    assert clipped.attributes["actions_clipped"] > 0
    with pytest.raises(ConfigError, match="out_of_bounds"):
        import_demonstrations(path, out_of_bounds="ignore")


def test_umis_images_are_jpeg_xl_and_its_action_is_made_of_poses(tmp_path: Path):
    import zarr

    codecs = pytest.importorskip("imagecodecs.numcodecs")
    path = tmp_path / "umi.zarr"
    frames = np.repeat(np.arange(5, 17, dtype=np.uint8), 32 * 32 * 3).reshape(12, 32, 32, 3)
    lossless = codecs.Jpegxl(level=99)
    stored = {
        "camera0_rgb": frames,
        "robot0_eef_pos": np.linspace(0, 1, 36).reshape(12, 3),
        "robot0_gripper_width": np.ones((12, 1)),
    }
    for key, values in stored.items():
        how = {"compressors": lossless, "chunks": (1, 32, 32, 3)} if key == "camera0_rgb" else {}
        array = zarr.create_array(
            str(path), name=f"data/{key}", shape=values.shape, dtype=values.dtype, zarr_format=2, **how
        )
        array[:] = values
    zarr.create_array(str(path), name="meta/episode_ends", data=np.array([5, 12]), zarr_format=2)
    demos = import_demonstrations(
        path, action=["robot0_eef_pos", "robot0_gripper_width"], keys=["camera0_rgb", "robot0_eef_pos"]
    )
    assert demos.arrays["action"].shape == (12, 4)
    np.testing.assert_array_equal(demos.arrays["camera0_rgb"], frames)
    np.testing.assert_array_equal(demos.arrays["robot0_eef_pos"], demos.arrays["action"][:, :3])

"""Columns are chosen before anything is read: by kind, by name, and never two for one key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from importer_samples import make_episodes

from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.inspection import inspect_demonstrations
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.errors import DataError

zarr = pytest.importorskip("zarr")
h5py = pytest.importorskip("h5py")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LENGTHS = (6, 11, 4)
STEPS = sum(LENGTHS)


def lerobot(
    folder: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **info: Any
) -> Path:
    """A dataset with these columns beside ``action`` and ``observation.state``; None drops one of them."""
    path = folder / "dataset"
    (path / "data").mkdir(parents=True)
    (path / "meta").mkdir()
    (path / "meta" / "info.json").write_text(json.dumps({"fps": 10, "features": features or {}, **info}))
    frames = np.concatenate([np.arange(n) for n in LENGTHS])
    table = {
        "episode_index": np.repeat(np.arange(3), LENGTHS),
        "frame_index": frames,
        "timestamp": pa.array(frames / 10, pa.float32()),
        "action": list(np.random.default_rng(1).normal(size=(STEPS, 2)).astype(np.float32)),
        "observation.state": list(np.arange(3.0 * STEPS, dtype=np.float32).reshape(STEPS, 3)),
        **columns,
    }
    kept = {name: values for name, values in table.items() if values is not None}
    pq.write_table(pa.table(kept), path / "data" / "file-000.parquet", row_group_size=8)
    return path


def robomimic(path: Path, extra: dict[str, Callable[[int], Any]], drop: tuple[str, ...] = ()) -> Path:
    """A file whose demonstrations hold ``extra[name](steps)`` at ``name`` beside the usual."""
    with h5py.File(path, "w") as file:
        for i, steps in enumerate(LENGTHS):
            usual = {
                "actions": np.full((steps, 2), i, np.float32),
                "obs/eef": np.ones((steps, 3), np.float32),
            }
            for name, values in usual.items():
                if name not in drop:
                    file[f"data/demo_{i}/{name}"] = values
            for name, make in extra.items():
                value = make(steps)
                if value is not None:
                    file[f"data/demo_{i}/{name}"] = value
    return path


def ones(*shape: int, dtype: Any = np.float32) -> Callable[[int], Any]:
    return lambda steps: np.ones((steps, *shape), dtype)


# --- two columns for one key ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["action", "reward", "states", "done", "truncated"])
def test_an_observation_never_takes_anothers_place(tmp_path: Path, name: str):
    twin = {"action": "actions", "reward": "rewards", "states": "states", "done": "dones"}.get(name)
    extra = {f"obs/{name}": ones(2)} | ({twin: ones()} if twin not in (None, "actions") else {})
    path = robomimic(tmp_path / "a.hdf5", extra)
    if twin is not None:
        with pytest.raises(DataError, match=rf"'obs/{name}'.*'{name}'.*rename=") as refused:
            import_demonstrations(path)
        assert f"'{twin}'" in str(refused.value)
    elif name != "states":
        with pytest.raises(DataError, match=rf"'obs/{name}' is an observation and would be called '{name}'"):
            import_demonstrations(path)
    demos = import_demonstrations(path, rename={f"obs/{name}": "other"})
    np.testing.assert_array_equal(demos.arrays["other"], np.ones((STEPS, 2)))
    assert demos.arrays["action"][0, 0] == 0
    chosen = import_demonstrations(path, keys=["eef"])
    assert chosen.arrays["action"][-1, 0] == 2
    assert chosen.arrays.keys() <= {"action", "eef", "reward"}
    alone = robomimic(tmp_path / "b.hdf5", {f"obs/{name}": ones(2)}, drop=("actions",))
    with pytest.raises(DataError, match=r"action=\[\.\.\.\]|rename="):  # an observation is no action
        import_demonstrations(alone)


def test_lerobots_own_names_collide_only_with_a_word(tmp_path: Path):
    garbage = list(np.full((STEPS, 2), 9.0, np.float32))
    path = lerobot(tmp_path, {"observation.action": garbage, "observation": garbage})
    with pytest.raises(
        DataError, match=r"'observation', 'observation\.state'|'action', 'observation\.action'"
    ):
        import_demonstrations(path)
    with pytest.raises(DataError, match=r"'observation', 'observation\.state'"):
        import_demonstrations(path, keys=["observation"])
    demos = import_demonstrations(path, rename={"observation.action": "echo", "observation": "goal"})
    assert demos.arrays["action"].max() < 9
    assert demos.arrays["observation"].shape == (STEPS, 3)
    assert (demos.arrays["echo"] == 9).all()


@pytest.mark.parametrize(
    "target", ["action", "obs/eef", "..", ".hidden", "", "a\\b", "line\nbreak", "x" * 300]
)
def test_a_key_that_would_vanish_or_collide_is_refused(tmp_path: Path, target: str):
    path = robomimic(tmp_path / "a.hdf5", {})
    with pytest.raises(DataError) as refused:
        import_to_store(path, tmp_path / "out.zarr", rename={"eef": target})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out.zarr").exists()


def test_a_store_refuses_a_key_that_it_cannot_give_back(tmp_path: Path, demos: Demonstrations):
    demos.arrays["obs/eef"] = demos.arrays["observation"]
    with pytest.raises(DataError, match="slash"):
        Demonstrations(demos.arrays, demos.episode_ends)


def test_arrays_in_groups_of_a_store_are_keys(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    nested = zarr.open_group(str(path), mode="a", zarr_format=2).require_group("data/obs")
    nested.create_array("eef", shape=(33, 3), dtype="f4", chunks=(33, 3))[...] = 4
    imported = import_demonstrations(path)
    assert (imported.arrays["obs.eef"] == 4).all()
    with pytest.raises(DataError, match="slash"):
        read_demonstrations(path)
    assert set(read_demonstrations(path, ["goal"]).arrays) >= {"goal", "action"}


# --- the action -------------------------------------------------------------------------------------------


def test_the_action_is_what_the_user_names(tmp_path: Path):
    path = robomimic(tmp_path / "a.hdf5", {"actions_abs": ones(7), "action_dict/gripper": ones()})
    demos = import_demonstrations(path, action="actions_abs")
    assert demos.arrays["action"].shape == (STEPS, 7)
    both = import_demonstrations(path, action=["actions", "action_dict/gripper"])
    assert both.arrays["action"].shape == (STEPS, 3)
    with pytest.raises(DataError, match="no key 'actions_rel'"):
        import_demonstrations(path, action="actions_rel")


@pytest.mark.parametrize("how", ["action", "concatenate", "rename"])
def test_an_action_in_parts_or_of_another_name(tmp_path: Path, how: str):
    arm, gripper = (list(np.full((STEPS, n), n, np.float32)) for n in (6, 1))
    path = lerobot(tmp_path, {"action": None, "action.arm": arm, "action.gripper": gripper, "actions": arm})
    with pytest.raises(DataError, match=r"action=\[\.\.\.\]"):
        import_demonstrations(path)
    request: dict[str, Any] = {
        "action": {"action": ["action.arm", "action.gripper"]},
        "concatenate": {"concatenate": {"action": ["action.arm", "action.gripper"]}},
        "rename": {"rename": {"actions": "action"}},
    }[how]
    demos = import_demonstrations(path, **request)
    assert demos.arrays["action"].shape == (STEPS, 6 if how == "rename" else 7)
    assert ("action.arm" in demos.arrays) == (how == "rename")


# --- what nobody asked for --------------------------------------------------------------------------------

UNASKED: dict[str, Callable[[int], Any]] = {
    "obs/ragged": lambda steps: np.ones((steps, steps)),
    "obs/nan": lambda steps: np.full((steps, 2), np.nan),
    "obs/text": lambda steps: np.array([b"go"] * steps),
    "obs/some": lambda steps: np.ones((steps, 2)) if steps > 5 else None,
    "obs/short": lambda steps: np.ones((steps - 1, 2)),
    "obs/huge": lambda steps: np.full((steps, 2), 1e300),
    "rewards": lambda steps: np.full(steps, np.nan),
}


@pytest.mark.parametrize("name", UNASKED)
def test_what_nobody_asked_for_is_neither_read_nor_judged(tmp_path: Path, name: str, caplog):
    path = robomimic(tmp_path / "a.hdf5", {name: UNASKED[name]})
    demos = import_demonstrations(path, keys=["eef"])
    assert set(demos.arrays) == {"action", "eef"}
    if name == "rewards":
        assert "nobody asked for it" in caplog.text
    elif name != "obs/text":
        with pytest.raises(DataError):
            import_demonstrations(path)


def test_unwritten_columns_and_rows_do_not_matter_either(tmp_path: Path):
    path = robomimic(tmp_path / "a.hdf5", {})
    with h5py.File(path, "a") as file:
        file["data/demo_1/obs"].create_dataset(
            "camera", (11, 2000, 2000, 3), np.uint8, chunks=(1, 500, 500, 3)
        )
    assert set(import_demonstrations(path, keys=["eef"]).arrays) == {"action", "eef"}
    with pytest.raises(DataError, match="camera"):
        import_demonstrations(path, keys=["camera"])
    ragged = [np.ones(1 + i % 3) for i in range(STEPS)]
    folder = lerobot(tmp_path, {"boxes": ragged, "next.reward": [None, *np.ones(STEPS - 1)]})
    assert set(import_demonstrations(folder, keys=["observation"]).arrays) == {"action", "observation"}
    with pytest.raises(DataError, match="boxes"):
        import_demonstrations(folder, keys=["boxes"])


def test_only_the_chosen_arrays_of_a_store_are_read(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    (path / "data" / "goal" / "0.0.0").unlink()
    assert "goal" not in import_demonstrations(path, keys=["observation"]).arrays
    with pytest.raises(DataError, match="goal"):
        import_demonstrations(path)
    zarr.open_group(str(path)).attrs["kinds"] = ["none by key"]
    assert "goal" not in import_demonstrations(path, keys=["observation"]).arrays
    zarr.open_group(str(path)).attrs["kinds"] = {"goal": "of a plugin that is not here"}
    assert "goal" not in import_demonstrations(path, keys=["observation"]).arrays
    description = path / "data" / "goal" / ".zarray"  # of a codec that is not installed
    told = json.loads(description.read_text())
    description.write_text(json.dumps({**told, "compressor": {"id": "another"}}))
    assert "goal" not in import_demonstrations(path, keys=["observation"]).arrays
    assert "goal" not in read_demonstrations(path, keys=["observation"]).arrays
    with pytest.raises(DataError, match=r"'data/goal' cannot be opened .*another"):
        read_demonstrations(path)


# --- kinds ------------------------------------------------------------------------------------------------

LEFT_OUT: dict[str, Any] = {
    "large text": pa.array(["pick"] * STEPS, pa.large_string()),
    "text view": pa.array(["pick"] * STEPS).cast(pa.string_view()),
    "dictionary": pa.array(["pick"] * STEPS).dictionary_encode(),
    "list of text": pa.array([["pick", "place"]] * STEPS),
    "list of structs": pa.array([[{"x": 1.0}]] * STEPS),
    "struct": pa.array([{"x": 1.0}] * STEPS),
    "datetime": pa.array(np.arange(STEPS), pa.timestamp("us")),
    "duration": pa.array(np.arange(STEPS), pa.duration("ms")),
    "bytes": pa.array([b"\xff\xd8"] * STEPS, pa.large_binary()),
    "decimal": pa.array([1] * STEPS).cast(pa.decimal128(20)),
    "map": pa.array([[("a", 1)]] * STEPS, pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(STEPS),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_no_number_is_left_out_with_a_word(tmp_path: Path, name: str, caplog):
    path = lerobot(tmp_path, {"odd": LEFT_OUT[name]})
    assert "odd" not in import_demonstrations(path).arrays
    assert "left out: odd" in caplog.text
    with pytest.raises(DataError, match="'odd' holds"):
        import_demonstrations(path, keys=["odd"])


def test_declared_shapes_are_kept(tmp_path: Path):
    columns = {
        "action": np.arange(STEPS, dtype=np.float32),
        "gripper": np.arange(STEPS, dtype=np.float32),
        "observation.poses": list(np.tile(np.eye(4, dtype=np.float32).reshape(-1), (STEPS, 2))),
        "observation.camera": list(np.full((STEPS, 3 * 16 * 12), 7, np.uint8)),
        "observation.depth": list(np.ones((STEPS, 16 * 12), np.float32)),
        "observation.images.top": None,
    }
    features = {
        "action": {"dtype": "float32", "shape": [1]},
        "gripper": {"dtype": "float32", "shape": [1]},
        "observation.poses": {"dtype": "float32", "shape": [2, 4, 4]},
        "observation.camera": {
            "dtype": "uint8",
            "shape": [3, 16, 12],
            "names": ["channels", "height", "width"],
        },
        "observation.depth": {"dtype": "float32", "shape": [16, 12, 1]},
        "observation.images.top": {"dtype": "video", "shape": [96, 96, 3]},
    }
    demos = import_demonstrations(lerobot(tmp_path, columns, features))
    assert demos.arrays["action"].shape == demos.arrays["gripper"].shape == (STEPS, 1)
    assert demos.arrays["poses"].shape == (STEPS, 32)
    assert demos.arrays["camera"].shape == (STEPS, 16, 12, 3)
    assert demos.arrays["camera"].dtype == np.uint8
    assert "depth" not in demos.arrays


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "becomes"),
    [
        ("obs/poses", (2, 4, 4), np.float32, (32,)),
        ("obs/poses", (2, 4, 4), np.uint8, (32,)),
        ("obs/points", (20, 30, 3), np.float32, (1800,)),
        ("obs/frames", (3, 16, 12), np.uint8, (16, 12, 3)),
        ("obs/top_image", (3, 16, 12), np.float64, (16, 12, 3)),
        ("obs/top", (16, 12, 3), np.uint8, (16, 12, 3)),
        ("obs/rgb", (4, 4, 3), np.uint8, (4, 4, 3)),
        ("obs/top_depth", (16, 12, 1), np.float32, None),
        ("obs/top", (16, 12, 1), np.uint16, None),
        ("obs/width", (), np.float32, (1,)),
    ],
)
def test_kinds_come_from_type_and_name(tmp_path: Path, name: str, shape: Any, dtype: Any, becomes: Any):
    path = robomimic(tmp_path / "a.hdf5", {name: ones(*shape, dtype=dtype)})
    store = read_demonstrations(import_to_store(path, tmp_path / "out.zarr"))
    key = name.removeprefix("obs/")
    if becomes is None:
        assert key not in store.arrays
        with pytest.raises(DataError, match=r"kinds="):
            import_demonstrations(path, keys=[key])
        assert import_demonstrations(path, keys=[key], kinds={key: "vector"}).arrays[key].ndim == 2
    else:
        assert store.arrays[key].shape[1:] == becomes
        assert store.arrays[key].dtype == (np.uint8 if len(becomes) == 3 or dtype == np.uint8 else np.float32)


def test_the_user_declares_what_a_file_does_not(tmp_path: Path):
    path = robomimic(tmp_path / "a.hdf5", {"obs/top": ones(16, 12, 3, dtype=np.float64)})
    assert import_demonstrations(path).arrays["top"].shape == (STEPS, 576)
    assert import_demonstrations(path, kinds={"top": "image"}).arrays["top"].dtype == np.uint8
    with pytest.raises(DataError, match="no whole numbers"):
        import_demonstrations(
            robomimic(tmp_path / "b.hdf5", {"obs/image": lambda n: np.full((n, 8, 8, 3), 0.5)})
        )


@pytest.mark.parametrize("shape", [(2, 4, 4), (16, 12, 1)])
def test_a_store_of_poses_or_depth_is_not_turned_into_pictures(tmp_path: Path, shape: tuple[int, ...]):
    demos = Demonstrations(
        {"action": np.zeros((5, 1), np.float32), "map": np.ones((5, *shape), np.float32)}, np.array([5])
    )
    back = read_demonstrations(write_demonstrations(tmp_path / "a.zarr", demos))
    assert back.arrays["map"].dtype == np.float32


def test_a_set_without_observations_is_not_ready(tmp_path: Path, demos: Demonstrations):
    bare = Demonstrations({"action": demos.arrays["action"]}, demos.episode_ends)
    path = write_demonstrations(tmp_path / "a.zarr", bare)
    assert "no observation" in (inspect_demonstrations(path).problem or "")
    with pytest.raises(DataError, match="no observation"):
        import_demonstrations(robomimic(tmp_path / "a.hdf5", {}, drop=("obs/eef",)))


# --- layouts of the field ---------------------------------------------------------------------------------


def test_isaac_labs_nested_groups(tmp_path: Path):
    path = robomimic(
        tmp_path / "a.hdf5",
        {
            "obs/policy/joint_pos": ones(9),
            "obs/subtask_terms/grasp": ones(dtype=bool),
            "states/articulation/robot/joint_position": ones(9),
            "initial_state/articulation/robot/root_pose": lambda steps: np.ones((1, 7)),
        },
    )
    demos = import_demonstrations(path)
    assert set(demos.arrays) == {"action", "eef", "policy.joint_pos", "subtask_terms.grasp"}
    named = import_demonstrations(path, keys=["joint_pos", "states/articulation/robot/joint_position"])
    assert set(named.arrays) == {"action", "policy.joint_pos", "states.articulation.robot.joint_position"}
    flat = robomimic(tmp_path / "b.hdf5", {"obs": ones(12)}, drop=("obs/eef",))
    assert import_demonstrations(flat).arrays["observation"].shape == (STEPS, 12)
    bare = robomimic(tmp_path / "c.hdf5", {"states/rigid_object/cube/root_pose": ones(7)}, drop=("obs/eef",))
    assert "states.rigid_object.cube.root_pose" in import_demonstrations(bare).arrays


def test_maniskills_nested_observations_have_a_row_more(tmp_path: Path):
    path = tmp_path / "trajectory.h5"
    with h5py.File(path, "w") as file:
        for i, steps in enumerate(LENGTHS):
            group = file.create_group(f"traj_{i}")
            group["actions"] = np.ones((steps, 4), np.float32)
            group["obs/agent/qpos"] = np.arange(steps + 1, dtype=np.float32)[:, None]
            group["obs/extra/is_grasped"] = np.zeros(steps + 1, bool)
            group["obs/sensor_data/base/rgb"] = np.zeros((steps + 1, 16, 16, 3), np.uint8)
            group["obs/sensor_data/base/depth"] = np.zeros((steps + 1, 16, 16, 1), np.int16)
            group["env_states/actors/cube"] = np.zeros((steps + 1, 13), np.float32)
            group["terminated"] = group["success"] = np.arange(steps) == steps - 1
    path.with_suffix(".json").write_text(json.dumps({"env_info": {"env_id": "PickCube-v1"}, "episodes": []}))
    demos = import_demonstrations(path)
    assert demos.attributes["env_id"] == "PickCube-v1"
    assert demos.arrays["agent.qpos"].ravel().tolist() == [i for n in LENGTHS for i in range(n)]
    assert demos.arrays["sensor_data.base.rgb"].shape == (STEPS, 16, 16, 3)
    assert "sensor_data.base.depth" not in demos.arrays
    assert "env_states.actors.cube" not in demos.arrays
    assert import_demonstrations(path, keys=["env_states/actors/cube"]).num_steps == STEPS


def test_aloha_compressed_images_are_left_out_with_a_word(write_sample: Callable[..., Path], caplog):
    path = write_sample("aloha")
    demos = import_demonstrations(path)
    assert demos.arrays["top"].shape == (STEPS, 16, 12, 3)
    assert demos.arrays["qvel"].shape == (STEPS, 3)
    one = import_demonstrations(path / "episode_1.hdf5")
    assert one.episode_lengths.tolist() == [len(make_episodes()[1]["action"])]
    for file in path.glob("*.hdf5"):
        with h5py.File(file, "a") as content:
            content.attrs["compress"] = True
            steps = len(content["action"])
            del content["observations/images/top"]
            content["observations/images/top"] = np.zeros((steps, 1000), np.uint8)  # padded JPEG files
            content["compress_len"] = np.full((1, steps), 900.0)
    caplog.clear()
    assert "top" not in import_demonstrations(path).arrays
    assert "left out: observations/images/top" in caplog.text

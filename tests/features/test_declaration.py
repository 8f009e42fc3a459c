"""Where kinds are declared: stores, checkpoints, descriptions; and files from before they were."""

import json
import sys
import types

import numpy as np
import pytest
import zarr
from kinds import policy_of

from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.sampling import as_tensors
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.errors import ConfigError, DataError, TaskError
from flowpolicy.features import Depth, Image, Pose, Task, Vector, undeclared
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint

STEPS = 6


@pytest.fixture
def demos():
    rng = np.random.default_rng(0)
    arrays = {
        "action": rng.normal(size=(STEPS, 2)),
        "state": rng.normal(size=(STEPS, 3)),
        "task": np.eye(2)[np.arange(STEPS) % 2],
        "camera": rng.integers(0, 256, (STEPS, 40, 36, 3), np.uint8),
        "front": rng.integers(0, 4000, (STEPS, 40, 36), np.uint16),
        "tool": np.tile(np.eye(4), (STEPS, 2, 1, 1)),
    }
    kinds = {"front": {"kind": "depth", "farthest": 3.0}, "tool": "pose"}
    return Demonstrations(arrays, np.array([4, STEPS]), {"kinds": kinds})


FEATURES = {
    "state": Vector((3,)),
    "task": Task((2,)),
    "camera": Image((40, 36, 3)),
    "front": Depth((40, 36), farthest=3.0),
    "tool": Pose((2, 4, 4)),
}


def features_in(demos):
    return {key: demos.feature(key) for key in FEATURES}


@pytest.mark.parametrize("image_codec", ["zstd", "jpeg2000"])
def test_a_store_says_what_it_holds(tmp_path, demos, image_codec):
    if image_codec == "jpeg2000":
        pytest.importorskip("imagecodecs")
    path = write_demonstrations(tmp_path / "a.zarr", demos, image_codec=image_codec)
    stored = zarr.open_group(str(path))
    assert stored.attrs["kinds"]["camera"] == "image"
    assert stored.attrs["kinds"]["state"] == "vector"
    back = read_demonstrations(path)
    assert features_in(back) == features_in(demos) == FEATURES
    assert back.arrays["front"].dtype == np.uint16
    if image_codec == "jpeg2000":
        assert stored["data/camera"].chunks[0] == 1
        assert stored["data/front"].chunks[0] > 1


def test_an_import_keeps_kinds_under_new_names(tmp_path, demos):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    again = import_to_store(path, tmp_path / "b.zarr", rename={"tool": "eef"})
    back = read_demonstrations(again)
    assert back.feature("eef") == FEATURES["tool"]
    assert back.feature("front") == FEATURES["front"]


def flattened(arrays):
    """A transform of demonstrations."""
    return {**arrays, "tool": arrays["tool"].reshape(STEPS, -1)}


def test_a_transform_makes_what_it_makes(tmp_path, demos, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_transforms", types.SimpleNamespace(flattened=flattened))
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    changed = import_demonstrations(path, demo_transform="my_transforms:flattened")
    assert changed.feature("tool") == Vector((32,))
    assert changed.feature("front") == FEATURES["front"]


def test_undeclared_poses_and_depth_are_no_images(tmp_path, demos):
    demos.attributes.clear()
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    stored = zarr.open_group(str(path))
    del stored.attrs["kinds"]
    assert read_demonstrations(path).feature("tool") == Vector((2, 4, 4))
    assert read_demonstrations(path).feature("camera") == Image((40, 36, 3))
    imported = import_demonstrations(path, kinds={"tool": "pose", "front": {"kind": "depth", "farthest": 3}})
    assert features_in(imported) == FEATURES
    plain = import_demonstrations(path)
    assert "front" not in plain.arrays  # left out with a word: nobody says what it is
    assert plain.arrays["tool"].shape == (STEPS, 32)
    kinds = {"tool": "pose", "front": "depth"}
    assert read_demonstrations(path, kinds=kinds).feature("front") == Depth((40, 36))


def test_images_with_their_channels_first_are_turned_around_by_an_import(tmp_path, demos):
    demos.arrays["camera"] = np.moveaxis(demos.arrays["camera"], -1, 1)
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    assert read_demonstrations(path).feature("camera") == Image((3, 40, 36))  # which no policy takes
    assert import_demonstrations(path).feature("camera") == Image((40, 36, 3))


def test_what_is_none_of_its_kind_is_not_imported(tmp_path, demos):
    demos.arrays["tool"][3, 0] *= 2
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    with pytest.raises(DataError, match="'tool' holds matrices that are no poses"):
        import_to_store(path, tmp_path / "b.zarr")
    assert not (tmp_path / "b.zarr").exists()
    with pytest.raises(ConfigError, match=r"'state' of shape .* is declared a pose"):
        import_demonstrations(path, keys=["state"], kinds={"state": "pose"})


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"tool": "poses"}, r"kinds\.tool\.kind is 'poses' \(did you mean 'pose'\?\)"),
        ({"tool": {"kind": "pose", "unit": "m"}}, r"Unknown setting 'kinds\.tool\.unit'"),
        (["pose"], "attribute 'kinds' must give kinds by key"),
        ({"tool": 3}, "attribute 'kinds' must give kinds by key"),
    ],
)
def test_a_declaration_that_is_none_is_refused(demos, kinds, reason):
    demos.attributes["kinds"] = kinds
    with pytest.raises(DataError, match=reason):
        demos.feature("tool")


def test_what_is_none_of_its_kind_is_refused_before_training(demos):
    assert as_tensors(demos, FEATURES, "cpu")["front"].max() < 4.001  # metres
    demos.arrays["tool"][3, 0] *= 2
    with pytest.raises(DataError, match="'tool' holds matrices that are no poses"):
        as_tensors(demos, ["tool"], "cpu")


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "feature"),
    [
        ("camera", (96, 96, 3), None, Image),
        ("tiny", (2, 4, 4), None, Image),  # as checkpoints without kinds mean it
        ("tiny", (2, 4, 4), np.float32, Vector),
        ("tiny", (2, 4, 4), np.uint8, Vector),
        ("camera", (3, 96, 96), None, Vector),
        ("camera", (3, 96, 96), np.uint8, Image),
        ("camera", (96, 96, 3), np.float32, Vector),
        ("rgb_image", (96, 96, 3), np.float32, Image),
        ("front", (96, 96), np.uint16, Vector),
        ("task", (4,), None, Task),
        ("state", (), None, Vector),
    ],
)
def test_what_nobody_declared(key, shape, dtype, feature):
    found = undeclared(key, shape, None if dtype is None else np.dtype(dtype))
    assert found == feature(shape)


def test_a_checkpoint_without_kinds_is_the_same_policy(tmp_path):
    policy = policy_of({"camera": (40, 36, 3), "state": (3,), "task": (2,)})
    assert policy.spec.features == {
        "camera": Image((40, 36, 3)), "state": Vector((3,)), "task": Task((2,))
    }  # fmt: skip
    file = policy.save(tmp_path / "checkpoint") / "config.json"
    content = json.loads(file.read_text())
    observations = content.pop("observations")
    content["observation_shapes"] = {key: item["shape"] for key, item in observations.items()}
    file.write_text(json.dumps({**content, "format_version": 1}))
    old = FlowPolicy.load(tmp_path / "checkpoint")
    assert old.config == policy.config
    assert fingerprint(old) == fingerprint(policy)


def test_a_kind_decides_the_fingerprint():
    plain, posed = policy_of({"tool": Vector((7,))}), policy_of({"tool": Pose((7,))})
    other = policy_of({"tool": Pose((7,), scalar_first=True)})
    assert len({fingerprint(policy) for policy in (plain, posed, other)}) == 3


def test_kinds_are_compared_where_both_sides_declare_them():
    spec = policy_of({"tool": Pose((7,))}).spec
    spec.check("The arm", {"tool": (7,)}, (2,))
    spec.check("The arm", {"tool": Pose((7,))}, (2,))
    for offered in (Vector((7,)), Pose((2, 7)), (2, 7), Pose((7,), scalar_first=True)):
        with pytest.raises(TaskError, match="The arm gives 'tool' of shape"):
            spec.check("The arm", {"tool": offered}, (2,))

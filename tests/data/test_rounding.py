import sys
import types

import numpy as np
import pytest

from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.sampling import as_tensors
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import DataError

RNG = np.random.default_rng(0)
UNIFORM = RNG.uniform(-1, 1, (500, 2))
COLLAPSING = {
    "UTM metres": 5e6 + UNIFORM,
    "seconds since 1970": 1.7e9 + np.arange(500)[:, None] / 50,
    "nanoseconds since 1970": (1_700_000_000_000_000_000 + np.arange(500) * 20_000_000)[:, None],
    "one dimension of three": np.concatenate([UNIFORM, 5e6 + UNIFORM[:, :1]], 1),
}
SOUND = {
    "unit range": UNIFORM,
    "a constant of many digits": np.full((500, 1), 5e6 + 1 / 3),
    "a body at rest that trembles": 0.82 + 1e-8 * UNIFORM,
    "tiny actions": 4e-7 * UNIFORM,
    "degrees": 180 * UNIFORM,
    "encoder counts": (UNIFORM * 100_000).astype(np.int64),
    "float32 already": (5e6 + UNIFORM).astype(np.float32),
    "nothing": np.empty((0, 2)),
}


@pytest.mark.parametrize("name", COLLAPSING)
def test_what_float32_cannot_tell_apart_is_noticed(name):
    assert collapses_in_float32(COLLAPSING[name])


@pytest.mark.parametrize("name", SOUND)
def test_what_float32_holds_is_left_alone(name):
    assert not collapses_in_float32(SOUND[name])


@pytest.fixture
def recording(tmp_path):
    """Flat HDF5 of 500 steps, among them a position in UTM metres."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "recording.hdf5", "w") as file:
        file["actions"], file["observations"], file["speed"] = UNIFORM, COLLAPSING["UTM metres"], UNIFORM
        file["rewards"], file["terminals"] = np.zeros(500), np.arange(500) == 499
    return tmp_path / "recording.hdf5"


def test_a_store_keeps_it_and_training_on_it_names_the_key_and_the_fix(recording, tmp_path):
    options = {"keys": ["position", "speed"], "rename": {"observations": "position"}}
    demos = read_demonstrations(import_to_store(recording, tmp_path / "store.zarr", "d4rl", **options))
    assert demos.arrays["speed"].dtype == demos.arrays["action"].dtype == np.float32
    assert np.array_equal(demos.arrays["position"], COLLAPSING["UTM metres"])
    assert np.array_equal(
        import_demonstrations(recording, "d4rl", **options).arrays["position"], demos.arrays["position"]
    )
    as_tensors(demos, ["speed", "action"], "cpu")  # nobody asks for the position
    with pytest.raises(DataError, match=r"'position' .* subtract a constant"):
        as_tensors(demos, ["position"], "cpu")


def test_images_on_disk_are_not_read_to_know_that_float32_holds_them():
    class OnDisk:
        ndim, dtype = 4, np.dtype(np.uint8)

        def __len__(self):
            return 1000

        def __getitem__(self, rows):
            raise AssertionError("it was read")

    assert not collapses_in_float32(OnDisk())


def test_a_transform_is_given_it_whole_and_may_subtract_a_constant(recording, monkeypatch):
    module = types.ModuleType("toy_centring")
    module.centred = lambda arrays: {**arrays, "observation": arrays["observation"] - 5e6}
    monkeypatch.setitem(sys.modules, "toy_centring", module)
    demos = import_demonstrations(recording, "d4rl", demo_transform="toy_centring:centred")
    assert demos.arrays["observation"].dtype == np.float32
    np.testing.assert_allclose(demos.arrays["observation"], UNIFORM, atol=1e-6)

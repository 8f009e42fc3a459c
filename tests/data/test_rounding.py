import numpy as np
import pytest

from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.sampling import as_tensors
from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
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


def test_an_import_keeps_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        file["observations"], file["actions"] = COLLAPSING["UTM metres"], UNIFORM
        file["terminals"] = np.arange(500) == 499
    arrays = import_demonstrations(tmp_path / "d4rl.hdf5").arrays
    assert np.array_equal(arrays["observation"], COLLAPSING["UTM metres"])
    assert arrays["action"].dtype == np.float32


def test_a_store_keeps_it_and_training_on_it_names_the_key_and_the_fix(tmp_path):
    arrays = {"action": UNIFORM, "position": COLLAPSING["UTM metres"], "speed": UNIFORM}
    path = write_demonstrations(tmp_path / "store.zarr", Demonstrations(arrays, np.array([500])))
    demos = read_demonstrations(path)
    assert np.array_equal(demos.arrays["position"], COLLAPSING["UTM metres"])
    as_tensors(demos, ["speed", "action"], "cpu")  # nobody asks for the position
    with pytest.raises(DataError, match=r"'position' .* subtract a constant"):
        as_tensors(demos, ["position"], "cpu")

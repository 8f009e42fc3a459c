"""The store gives back what was put in, opens others' stores, and refuses what is broken."""

from __future__ import annotations

import errno
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import DataError, FlowPolicyError

zarr = pytest.importorskip("zarr")


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_round_trip_is_exact(tmp_path: Path, demos: Demonstrations, name: str, zarr_format: int):
    path = write_demonstrations(tmp_path / name, demos, zarr_format=zarr_format, attributes={"recipe": "r"})
    back = read_demonstrations(path)
    assert back.arrays.keys() == demos.arrays.keys()
    for key, array in demos.arrays.items():
        assert back.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(back.arrays[key], array)
    np.testing.assert_array_equal(back.episode_ends, demos.episode_ends)
    kinds = {"observation": "vector", "goal": "vector"}
    assert back.attributes == {**demos.attributes, "recipe": "r", "kinds": kinds}
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_default_layout_is_diffusion_policys(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    assert (path / ".zgroup").is_file()
    assert (path / "data" / "action" / ".zarray").is_file()
    assert (path / "meta" / "episode_ends" / ".zarray").is_file()


def test_zip_of_a_folder_opens(tmp_path: Path, demos: Demonstrations):
    write_demonstrations(tmp_path / "a.zarr", demos)
    packed = shutil.make_archive(str(tmp_path / "packed.zarr"), "zip", tmp_path, "a.zarr")
    np.testing.assert_array_equal(read_demonstrations(packed).arrays["action"], demos.arrays["action"])


def test_only_the_keys_asked_for_are_read(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    assert set(read_demonstrations(path, ["goal"]).arrays) == {"goal", "action", "reward", "terminated"}
    with pytest.raises(DataError, match="no key 'gaol'"):
        read_demonstrations(path, ["gaol"])


def test_package_files_have_an_address(tmp_path: Path):
    import flowpolicy

    assert resolve_path("pkg://flowpolicy/py.typed") == Path(flowpolicy.__file__).parent / "py.typed"
    assert resolve_path(Path("pkg://flowpolicy/py.typed")).is_file()
    with pytest.raises(DataError, match="no_such_package"):
        resolve_path("pkg://no_such_package/file")


@pytest.mark.parametrize(("integral", "dtype"), [(True, np.uint8), (False, np.float32)])
def test_float_images_become_uint8_only_where_nothing_is_lost(tmp_path: Path, integral: bool, dtype: type):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(6, 4, 4, 3)).astype(np.float32)
    if not integral:
        images[4, 0, 0, 0] = 0.5
    demos = Demonstrations({"action": np.zeros((6, 1), np.float32), "image": images}, np.array([6]))
    back = read_demonstrations(write_demonstrations(tmp_path / "a.zarr", demos)).arrays["image"]
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, images)


def test_episode_properties(demos: Demonstrations):
    assert demos.num_steps == 33
    assert list(demos.episode_lengths) == [7, 12, 5, 9]
    assert list(demos.episode_starts) == [0, 7, 19, 24]
    expected = [demos.arrays["reward"][a:b].sum() for a, b in ((0, 7), (7, 19), (19, 24), (24, 33))]
    np.testing.assert_allclose(demos.episode_returns, expected, rtol=1e-5)
    chosen = demos.select_episodes([2, 0])
    assert list(chosen.episode_ends) == [5, 12]
    np.testing.assert_array_equal(chosen.arrays["action"][:5], demos.arrays["action"][19:24])
    np.testing.assert_array_equal(chosen.arrays["action"][5:], demos.arrays["action"][:7])


def test_existing_path_is_left_alone(tmp_path: Path, demos: Demonstrations):
    (tmp_path / "a.zarr").write_text("precious")
    with pytest.raises(DataError, match="exists already"):
        write_demonstrations(tmp_path / "a.zarr", demos)
    assert (tmp_path / "a.zarr").read_text() == "precious"


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_full_disk_leaves_nothing(tmp_path: Path, demos: Demonstrations, name: str, monkeypatch):
    from flowpolicy.data.store_writing import StoreWriter

    created = StoreWriter._create

    def full(self: StoreWriter, name: str, *arguments: object) -> object:
        if name == "data/reward":
            raise OSError(errno.ENOSPC, "No space left on device")
        return created(self, name, *arguments)

    monkeypatch.setattr(StoreWriter, "_create", full)
    with pytest.raises(FlowPolicyError, match="disk is full"):
        write_demonstrations(tmp_path / name, demos)
    assert list(tmp_path.iterdir()) == []


def test_a_zip_store_is_readable_by_zipfile(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr.zip", demos)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert len(set(file.namelist())) == len(file.namelist())


def test_real_pusht_opens_unchanged(shared_data: Path):
    demos = read_demonstrations(shared_data / "pusht" / "pusht_cchi_v7_replay.zarr.zip", ["state"])
    known = np.load(shared_data / "pusht" / "pusht_lowdim.npz")
    np.testing.assert_array_equal(demos.arrays["state"], known["state"])
    np.testing.assert_array_equal(demos.arrays["action"], known["action"])
    np.testing.assert_array_equal(demos.episode_ends, known["episode_ends"])


def filmed(size: int = 48) -> Demonstrations:
    """Two episodes with smooth images, as cameras give them."""
    steps, rng = 90, np.random.default_rng(0)
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    phase = rng.uniform(0, 6, (steps, 1, 1, 3))
    images = 127 + 120 * np.sin(rows[None, ..., None] / 9 + phase) * np.cos(columns[None, ..., None] / 7)
    arrays = {"image": images.astype(np.uint8), "action": rng.normal(size=(steps, 2)).astype(np.float32)}
    return Demonstrations(arrays, np.array([40, 90]))


def test_jpeg2000_is_smaller_than_zstd_and_nearly_the_same(tmp_path: Path):
    pytest.importorskip("imagecodecs")
    demos = filmed()
    paths = {name: write_demonstrations(tmp_path / f"{name}.zarr.zip", demos, image_codec=name)
             for name in ("zstd", "jpeg2000")}  # fmt: skip
    lossy, exact = (read_demonstrations(paths[name]).arrays["image"] for name in ("jpeg2000", "zstd"))
    assert np.array_equal(exact, demos.arrays["image"])
    difference = np.abs(lossy.astype(int) - exact)
    assert difference.max() <= 16
    assert difference.mean() < 2
    assert paths["jpeg2000"].stat().st_size < paths["zstd"].stat().st_size


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_images_beyond_the_memory_are_mapped_from_disk_once(tmp_path: Path, name: str):
    demos = filmed()
    path = write_demonstrations(tmp_path / name, demos)
    read = read_demonstrations(path, image_memory_bytes=1000).arrays["image"]
    assert isinstance(read, np.memmap)
    assert np.array_equal(read, demos.arrays["image"])
    files = list((tmp_path / f"{name}.unpacked").iterdir())
    before = files[0].stat().st_mtime_ns
    again = read_demonstrations(path, image_memory_bytes=1000).arrays["image"]
    assert np.array_equal(again, read)
    assert [file.stat().st_mtime_ns for file in (tmp_path / f"{name}.unpacked").iterdir()] == [before]
    assert not isinstance(read_demonstrations(path).arrays["image"], np.memmap)


@pytest.mark.parametrize("name", ["store.zarr", "store.zarr.zip"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_key_may_begin_another(tmp_path, demos, name, zarr_format):
    demos.arrays["goal_site"] = demos.arrays["goal"] + 1
    back = read_demonstrations(write_demonstrations(tmp_path / name, demos, zarr_format=zarr_format))
    for key in ("goal", "goal_site"):
        np.testing.assert_array_equal(back.arrays[key], demos.arrays[key])

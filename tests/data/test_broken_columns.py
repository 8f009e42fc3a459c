"""In every format, a column that nobody asked for may be broken: it is not read, and in nobody's way."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import lerobot_samples
import numpy as np
import pytest
from importer_samples import OBSERVATION

from flowpolicy.data.importers import FORMATS, import_demonstrations, import_to_store
from flowpolicy.errors import DataError

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
GARBAGE = b"neither an image nor a chunk"
Write = Callable[[str], Path]


def _in_hdf5(path: Path, places: dict[str, int]) -> None:
    """Images by name, of so many steps, whose compressed chunks are garbage."""
    with h5py.File(path, "a") as file:
        for name, steps in places.items():
            shape = (steps, 8, 8, 3)
            images = file.create_dataset(name, shape, np.uint8, chunks=(1, 8, 8, 3), compression="gzip")
            for step in range(steps):
                images.id.write_direct_chunk((step, 0, 0, 0), GARBAGE)


def _robomimic(write: Write) -> tuple[Path, str]:
    path = write("robomimic")
    _in_hdf5(path, {f"data/demo_{i}/obs/camera": steps for i, steps in enumerate((6, 11, 4))})
    return path, "camera"


def _minari(write: Write) -> tuple[Path, str]:
    path = write("minari")
    main = path / "data" / "main_data.hdf5"
    _in_hdf5(main, {f"episode_{i}/infos/camera": steps + 1 for i, steps in enumerate((6, 11, 4))})
    return path, "infos/camera"


def _d4rl(write: Write) -> tuple[Path, str]:
    path = write("d4rl")
    _in_hdf5(path, {"infos/camera": 21})
    return path, "infos/camera"


def _aloha(write: Write) -> tuple[Path, str]:
    path = write("aloha")
    for i, steps in enumerate((6, 11, 4)):
        _in_hdf5(path / f"episode_{i}.hdf5", {"observations/images/wrist": steps})
    return path, "wrist"


def _maniskill(write: Write) -> tuple[Path, str]:
    path = write("maniskill")
    _in_hdf5(path, {f"traj_{i}/env_states/camera": steps + 1 for i, steps in enumerate((6, 11, 4))})
    return path, "env_states/camera"


def _adroit(write: Write) -> tuple[Path, str]:
    path = write("adroit")
    episodes = pickle.loads(path.read_bytes())
    for episode in episodes:
        episode["words"] = np.array(["push"] * len(episode["actions"]), object)
    path.write_bytes(pickle.dumps(episodes))
    return path, "words"


def _umi(write: Write) -> tuple[Path, str]:
    """UMI's images in JPEG XL, one file each."""
    codecs = pytest.importorskip("imagecodecs.numcodecs")
    path = write("diffusion_policy")
    zarr.create_array(
        str(path), name="data/camera0_rgb", shape=(21, 8, 8, 3), dtype=np.uint8, chunks=(1, 8, 8, 3),
        compressors=codecs.Jpegxl(level=99), zarr_format=2,
    )[:] = 7  # fmt: skip
    for chunk in (path / "data" / "camera0_rgb").glob("[0-9]*"):
        chunk.write_bytes(GARBAGE)
    return path, "camera0_rgb"


def _lerobot(write: Write) -> tuple[Path, str]:
    """A column whose pages are overwritten; what describes them is sound."""
    path = write("lerobot")
    for file in (path / "data").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        table = table.append_column("force", pa.array(np.random.default_rng(0).normal(size=len(table))))
        pq.write_table(table, file, use_dictionary=False)
        chunk = pq.read_metadata(file).row_group(0).column(table.num_columns - 1)
        content = bytearray(file.read_bytes())
        start, size = chunk.data_page_offset, chunk.total_compressed_size
        content[start : start + size] = b"\xff" * size
        file.write_bytes(content)
    return path, "force"


BROKEN: dict[str, Callable[[Write], tuple[Path, str]]] = {
    "robomimic": _robomimic,
    "minari": _minari,
    "d4rl": _d4rl,
    "aloha": _aloha,
    "maniskill": _maniskill,
    "adroit": _adroit,
    "diffusion_policy": _umi,
    "lerobot": _lerobot,
}


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_not_read(name: str, write_sample: Callable[..., Path], episodes, tmp_path: Path):
    path, column = BROKEN[name](write_sample)
    key = OBSERVATION.get(name, "observation")
    demos = import_demonstrations(path, keys=[key])
    wanted = np.concatenate([episode["observation"] for episode in episodes])
    np.testing.assert_array_equal(demos.arrays[key], wanted)
    with pytest.raises(DataError, match=f"{column.rpartition('/')[2]}|damaged") as refused:
        import_to_store(path, tmp_path / "a.zarr", keys=[column])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(("layout", "images"), [(2, "image"), (3, "image"), (2, "video")])
def test_another_camera_is_not_decoded(layout: int, images: str, tmp_path: Path):
    """Images in the tables, or an episode's own video; layout 3's videos stand in ``test_lerobot``."""
    pytest.importorskip("av")
    path = lerobot_samples.write(tmp_path, layout, images=images)
    top, wrist = lerobot_samples.CAMERAS
    if images == "video":
        (path / f"videos/chunk-000/{wrist}/episode_000001.mp4").write_bytes(GARBAGE)
    else:
        for file in (path / "data").rglob("*.parquet"):
            table = pq.read_table(file, partitioning=None)
            stored = [{"bytes": GARBAGE, "path": None}] * len(table)
            at, kind = table.column_names.index(wrist), table.schema.field(wrist).type
            pq.write_table(table.set_column(at, wrist, pa.array(stored, kind)), file)
    demos = import_demonstrations(path, keys=[top])
    found = demos.arrays["images.top"].mean(axis=(1, 2, 3))
    assert np.abs(found - lerobot_samples.expected(0)).max() < 3
    with pytest.raises(DataError, match="wrist"):
        import_demonstrations(path, keys=[wrist])

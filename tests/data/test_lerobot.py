"""LeRobot datasets whole: each step has its own frame, and damage is one sentence."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import lerobot_samples as samples
import numpy as np
import pytest
from lerobot_samples import CAMERAS, FPS, LENGTHS, SIZE, TASKS, expected

from flowpolicy.data.importers import import_demonstrations, import_to_store
from flowpolicy.data.store import read_demonstrations
from flowpolicy.data.videos import Video
from flowpolicy.errors import DataError

pytest.importorskip("pyarrow")
pytest.importorskip("zarr")
av = pytest.importorskip("av")

STEPS = sum(LENGTHS)
TOP, WRIST = "images.top", "images.wrist"


def brightness(images: np.ndarray) -> np.ndarray:
    """Of the middle of each image, to the step of 7 that tells frames apart."""
    return images[:, 16:48, 16:80].reshape(len(images), -1).mean(axis=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.write(tmp_path_factory.mktemp("lerobot"))


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "dataset"))


@pytest.mark.parametrize(
    ("layout", "codec"),
    [(2, "libx264"), (3, "libx264"), (3, "libx265"), (3, "libsvtav1"), (3, "libvpx-vp9")],
)
def test_each_step_has_its_own_frame(tmp_path: Path, layout: int, codec: str):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    demos = import_demonstrations(samples.write(tmp_path, layout, codec))
    for number, key in enumerate((TOP, WRIST)):
        assert demos.arrays[key].shape == (STEPS, *SIZE, 3)
        assert demos.arrays[key].dtype == np.uint8
        assert np.abs(brightness(demos.arrays[key]) - expected(number)).max() < 3
    assert demos.episode_ends.tolist() == np.cumsum(LENGTHS).tolist()


def test_what_the_dataset_says_is_kept(whole: Path, tmp_path: Path):
    store = import_to_store(whole, tmp_path / "a.zarr", keys=["observation"])
    demos = read_demonstrations(store)
    assert demos.attributes["tasks"] == list(TASKS)
    assert demos.arrays["task_index"].tolist() == [0] * 7 + [1] * 5 + [0] * 9
    assert demos.attributes["fps"] == FPS
    assert demos.attributes["robot_type"] == "toy"
    assert demos.attributes["dimension_names"]["action"] == ["pan", "lift"]
    assert "task_index" not in demos.attributes["kinds"]
    assert set(demos.arrays) == {"action", "observation", "task_index"}


def test_images_in_the_tables(tmp_path: Path):
    path = samples.write(tmp_path, 2, images="image")
    demos = import_demonstrations(path)
    assert (brightness(demos.arrays[WRIST]) == expected(1)).all()
    info = json.loads((path / "meta" / "info.json").read_text())
    info["features"][CAMERAS[1]] |= {"shape": [3, 32, 32], "names": ["channels", "height", "width"]}
    (path / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"images\.wrist' holds an image of 64 x 96 .* declares 32 x 32"):
        import_demonstrations(path)
    assert TOP in import_demonstrations(path, keys=[TOP]).arrays


def test_chosen_episodes_alone(dataset: Path):
    demos = import_demonstrations(dataset, options={"episodes": [2, 1]})
    assert np.abs(brightness(demos.arrays[TOP]) - expected(0)[7:]).max() < 3
    with pytest.raises(DataError, match="no episode 5"):
        import_demonstrations(dataset, options={"episodes": [5]})


def test_indices_of_deleted_episodes_may_be_absent(tmp_path: Path):
    path = samples.write(tmp_path, 2)
    info = json.loads((path / "meta" / "info.json").read_text())
    info |= {"total_episodes": 2, "total_frames": STEPS - LENGTHS[1]}
    (path / "meta" / "info.json").write_text(json.dumps(info))
    (path / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    for camera in CAMERAS:
        (path / "videos" / "chunk-000" / camera / "episode_000001.mp4").unlink()
    demos = import_demonstrations(path)
    assert np.abs(brightness(demos.arrays[WRIST]) - np.delete(expected(1), slice(7, 12))).max() < 3


def test_size_and_number_of_steps_on_request(whole: Path, tmp_path: Path):
    request = {"image_size": [16, 20], "every": 3, "keys": [TOP]}
    demos = read_demonstrations(import_to_store(whole, tmp_path / "a.zarr", **request))
    kept = [e + step for e, n in zip((0, 7, 12), LENGTHS, strict=True) for step in range(0, n, 3)]
    assert demos.arrays[TOP].shape == (len(kept), 16, 20, 3)
    middle = demos.arrays[TOP][:, 4:12, 4:16].reshape(len(kept), -1).mean(axis=1)
    assert np.abs(middle - expected(0)[kept]).max() < 3
    assert demos.episode_ends.tolist() == [3, 5, 8]
    assert demos.attributes["fps"] == pytest.approx(FPS / 3)


# --- damage ------------------------------------------------------------------------------------------------

FILE = f"videos/{CAMERAS[1]}/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def _rename_video_path(path: Path, pattern: str) -> None:
    info = json.loads((path / "meta" / "info.json").read_text())
    (path / "meta" / "info.json").write_text(json.dumps({**info, "video_path": pattern}))


def _move(path: Path, seconds: float) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path / EPISODES, partitioning=None)
    name = f"videos/{CAMERAS[1]}/from_timestamp"
    moved = pa.array([value + seconds for value in table.column(name).to_pylist()], pa.float64())
    pq.write_table(table.set_column(table.column_names.index(name), name, moved), path / EPISODES)


def _cut_in_half(path: Path) -> None:
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[: len(content) // 2])


def _overwrite_frames(path: Path) -> None:
    content = bytearray((path / FILE).read_bytes())
    at = content.index(b"mdat") + 900
    content[at : at + 200] = bytes(200)
    (path / FILE).write_bytes(content)


def _other(frames: int, size: tuple[int, int], codec: str = "libx264") -> Callable[[Path], None]:
    return lambda path: samples.encode(path / FILE, [np.zeros((*size, 3), np.uint8)] * frames, codec)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a lost video": (lambda p: (p / FILE).unlink(), "There is no video"),
    "an empty video": (lambda p: (p / FILE).write_bytes(b""), "file-000.mp4 is"),
    "a text file": (lambda p: (p / FILE).write_text("<html>404</html>"), "cut off, damaged or no video"),
    "a playlist": (
        lambda p: (p / FILE).write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        "cut off, damaged or no video",
    ),
    "a video cut in half": (_cut_in_half, "cut off, damaged or no video|has no frame"),
    "frames overwritten": (_overwrite_frames, "file-000.mp4"),
    "another size": (_other(12, (64, 48)), "64 x 48 pixels and the dataset declares 64 x 96"),
    "fewer frames": (_other(11, SIZE), "11 frames for the 12 steps"),
    "another codec": (_other(12, SIZE, "mjpeg"), "codec mjpeg; encode it as one of h264"),
    "another beginning": (lambda p: _move(p, 0.5), "has no frame at 1.200 s|has no frame"),
    "a negative beginning": (lambda p: _move(p, -9.0), "has no frame"),
    "infinity": (lambda p: _move(p, float("inf")), "does not say where"),
    "no place given": (lambda p: (p / EPISODES).unlink(), "does not say where"),
    "a path out of the folder": (lambda p: _rename_video_path(p, "../{video_key}.mp4"), "leads out"),
    "a path with other fields": (lambda p: _rename_video_path(p, "{secret}.mp4"), "names 'secret'"),
    "a huge pattern": (lambda p: _rename_video_path(p, "{file_index:0999999999d}.mp4"), "There is no video"),
}
OF_BOTH_CAMERAS = ("no place given", "a path out of the folder", "a path with other fields", "a huge pattern")


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_and_in_nobodys_way(dataset: Path, tmp_path: Path, name: str):
    change, words = DAMAGE[name]
    change(dataset)
    with pytest.raises(DataError, match=words) as refused:
        import_to_store(dataset, tmp_path / "a.zarr")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.zarr").exists()
    assert not list(tmp_path.glob(".a*"))
    other = "observation" if name in OF_BOTH_CAMERAS else TOP
    assert other in import_demonstrations(dataset, keys=[other]).arrays


def test_only_the_chosen_camera_is_fetched_from_the_hub(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def snapshot_download(repo_id: str, repo_type: str, allow_patterns: list[str]) -> str:
        for file in whole.rglob("*"):
            name = str(file.relative_to(whole))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)
    )
    monkeypatch.chdir(tmp_path)
    demos = import_demonstrations("toy/sample", "lerobot", keys=[WRIST])
    assert np.abs(brightness(demos.arrays[WRIST]) - expected(1)).max() < 3
    assert {file.parents[1].name for file in (tmp_path / "cache").rglob("*.mp4")} == {CAMERAS[1]}


def test_tables_without_their_videos(dataset: Path, caplog: pytest.LogCaptureFixture):
    shutil.rmtree(dataset / "videos")
    with caplog.at_level(logging.WARNING):
        assert set(import_demonstrations(dataset).arrays) == {"action", "observation", "task_index"}
    assert f"has no videos beside the tables); left out: {CAMERAS[0]}" in caplog.text
    with pytest.raises(DataError, match="has no videos beside the tables"):
        import_demonstrations(dataset, keys=[TOP])


def test_damaged_tasks_are_in_nobodys_way(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = samples.write(tmp_path, 2, images="image")
    (path / "meta" / "tasks.jsonl").write_text('{"task_index": 0}\n')
    demos = import_demonstrations(path, keys=["observation"])
    assert "tasks.jsonl must hold" in caplog.text
    assert not {"tasks", "task_index"} & {*demos.attributes, *demos.arrays}


def test_a_frame_that_grows_costs_no_memory(tmp_path: Path):
    """The file's tables say 48 x 32 and its stream has frames a thousand times as large."""
    path = tmp_path / "grown.mp4"
    samples.encode(path, [np.zeros((1024, 1536, 3), np.uint8)] * 2, preset="ultrafast")
    content = bytearray(path.read_bytes())
    at = content.index(b"avc1", content.index(b"stsd")) + 28
    content[at : at + 4] = SIZE[1].to_bytes(2, "big") + SIZE[0].to_bytes(2, "big")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1024 x 1536|cannot be decoded|Invalid data"):
        next(Video(path, (*SIZE, 3)).frames(np.zeros(1), 0.1))

"""A LeRobot dataset that is written here comes back as it was, and lerobot itself loads it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.lerobot_statistics import depth_sample, pixel_counts, pixel_statistics
from flowpolicy.data.lerobot_writing import write_lerobot
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.video_writing import fair_scheduling, write_video
from flowpolicy.errors import ConfigError, DataError

pytest.importorskip("pyarrow")
pytest.importorskip("av")


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_videos_come_back_nearly_as_they_were(recorded: Demonstrations, tmp_path: Path, codec: str):
    smooth = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)
    shifted = np.stack([np.roll(smooth, 4 * step, axis=1) // 2 + 40 for step in range(12)])
    recorded.arrays = {
        "action": recorded.arrays["action"],
        "camera": np.repeat(shifted[..., None], 3, axis=3),
    }
    recorded.attributes = {"fps": 10}
    out = write_lerobot(tmp_path / "out", recorded, images=codec, task="push it")
    back = import_demonstrations(out)
    error = np.abs(back.arrays["camera"].astype(int) - recorded.arrays["camera"])
    assert error.reshape(12, -1).mean(axis=1).max() < 3
    assert back.attributes["tasks"] == ["push it"]
    assert len(list(out.rglob("*.mp4"))) == 3


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not say")
def test_an_encoder_is_scheduled_as_everything_else(tmp_path: Path):
    """Which SVT-AV1 sees to otherwise, for all threads of a program of root's."""

    def in_real_time():
        threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
        return [thread for thread in threads if os.sched_getscheduler(thread) in (os.SCHED_FIFO, os.SCHED_RR)]

    seen = []

    def frames():
        for number in range(3):
            if number:
                seen.append(in_real_time())
            yield np.full((64, 64, 3), 40 * number, np.uint8)

    write_video(tmp_path / "video.mp4", frames(), 10, "av1")
    assert seen == [[], []]
    assert in_real_time() == []


def test_a_thread_keeps_the_scheduling_that_it_had():
    is_ready, is_over = threading.Event(), threading.Event()

    def prioritized():
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(7))
        is_ready.set()
        is_over.wait()

    thread = threading.Thread(target=prioritized)
    thread.start()
    is_ready.wait()
    try:
        if os.sched_getscheduler(thread.native_id) != os.SCHED_FIFO:
            pytest.skip("the system does not allow it")
        with fair_scheduling():
            os.sched_setscheduler(thread.native_id, os.SCHED_OTHER, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert os.sched_getscheduler(thread.native_id) == os.SCHED_FIFO
        assert os.sched_getparam(thread.native_id).sched_priority == 7
    finally:
        is_over.set()
        thread.join()


def test_statistics_are_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    found = pixel_statistics(pixel_counts(images, 3), len(images))
    flat = images.reshape(-1, 3) / 255
    for name, value in {
        "min": flat.min(0),
        "max": flat.max(0),
        "mean": flat.mean(0),
        "std": flat.std(0),
    }.items():
        np.testing.assert_allclose(np.ravel(found[name]), value, atol=1e-9)
    np.testing.assert_allclose(np.ravel(found["q50"]), np.median(flat, axis=0), atol=1 / 255)


def test_statistics_of_depth_look_at_some_pixels_of_many_frames():
    maps = np.broadcast_to(np.arange(50.0)[:, None, None, None], (50, 480, 640, 1))
    found = depth_sample(maps, np.arange(0, 50, 2))
    assert found.shape[1:] == (1, 1, 1)
    assert 2000 < len(found) < 8000
    assert {*found.ravel()} == {*range(0, 50, 2)}


def test_statistics_of_a_depth_map_are_one_number_each(recorded: Demonstrations, tmp_path: Path):
    out = write_lerobot(tmp_path / "out", recorded)
    found = json.loads((out / "meta" / "stats.json").read_text())["observation.front"]
    np.testing.assert_allclose(found["mean"], [[recorded.arrays["front"].mean()]], rtol=1e-6)


def test_what_cannot_be_written_is_said(recorded: Demonstrations, tmp_path: Path):
    with pytest.raises(DataError, match=r"'observation\.grey' has images .* images=png"):
        write_lerobot(tmp_path / "out", recorded, images="h264")
    with pytest.raises(ConfigError, match="images is 'gif'"):
        write_lerobot(tmp_path / "out", recorded, images="gif")
    recorded.arrays["task_index"][3] = 2
    with pytest.raises(DataError, match="'task_index' reaches 2"):
        write_lerobot(tmp_path / "out", recorded)
    del recorded.attributes["fps"]
    with pytest.raises(DataError, match="does not say its rate"):
        write_lerobot(tmp_path / "out", recorded)
    assert not (tmp_path / "out").exists()
    turned = {"action": recorded.arrays["action"], "camera": np.zeros((12, 3, 16, 16), np.uint8)}
    with pytest.raises(ConfigError, match=r"'camera' is an image .* with its channels first"):
        write_lerobot(tmp_path / "out", Demonstrations(turned, recorded.episode_ends, {"fps": 10}))


def test_lerobot_loads_it(recorded: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = module.LeRobotDataset("toy/out", root=write_lerobot(tmp_path / "out", recorded))
    assert len(dataset) == 12
    np.testing.assert_array_equal(dataset[7]["action"].numpy(), recorded.arrays["action"][7])
    assert [dataset[step]["task"] for step in (4, 5, 11)] == ["lift", "push", "lift"]
    np.testing.assert_allclose(
        dataset[7]["observation.images.top"].numpy().transpose(1, 2, 0),
        recorded.arrays["images.top"][7] / 255,
        atol=1e-6,
    )

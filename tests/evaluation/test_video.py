import logging
import sys

import numpy as np
import pytest
from toys import ToyEnv, ToyPolicy, toy_task

from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.video import captioned, frame_timing


@pytest.mark.parametrize(
    ("hz", "stride", "fps"), [(10, 1, 10), (30, 1, 30), (125, 5, 25), (50, 2, 25), (31, 2, 15.5)]
)
def test_films_run_in_real_time_at_thirty_frames_or_fewer(hz, stride, fps):
    assert frame_timing(hz) == (stride, fps)


def test_caption_keeps_the_picture_and_makes_even_sides():
    frame = np.random.default_rng(0).integers(0, 255, (51, 33, 3), dtype=np.uint8)
    picture = captioned(frame, "toy  return 1.0" * 20)
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    assert picture.shape[1] >= 320
    np.testing.assert_array_equal(picture[: 51 * 10 : 10, : 33 * 10 : 10], frame)
    if pytest.importorskip("PIL"):
        assert picture[51 * 10 :].max() > 150  # the words


def test_the_first_episodes_are_filmed_in_order_into_one_file(tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "new" / "video.mp4"
    result = evaluate(ToyPolicy(), toy_task(), episodes=6, num_envs=3, record=2, video=path)
    assert result.video == path
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]
    with imageio.get_reader(path) as reader:
        frames = [frame for frame in reader]  # noqa: C416 - list() asks for a length, which is infinite
        assert reader.get_meta_data()["fps"] == 10
        assert reader.get_meta_data()["codec"] == "h264"
    lengths = result.lengths[:2]
    assert len(frames) == sum(
        lengths + 1 + 5
    )  # the reset, each step, and the last one held for half a second
    brightness = np.array([frame[:400].mean() for frame in frames])
    assert brightness[lengths[0] + 6] < 10 < brightness[lengths[0]]  # the second episode starts dark again
    unfilmed = evaluate(ToyPolicy(), toy_task(), episodes=6, num_envs=3)
    np.testing.assert_array_equal(result.returns, unfilmed.returns)
    assert unfilmed.video is None


def test_a_renderer_that_fails_costs_one_sentence_and_the_film_only(tmp_path, monkeypatch, caplog):
    def fail(self):
        raise RuntimeError("no OpenGL\ncontext")

    monkeypatch.setattr(ToyEnv, "render", fail)
    with caplog.at_level(logging.WARNING):
        result = evaluate(ToyPolicy(), toy_task(), episodes=3, record=2, video=tmp_path / "video.mp4")
    assert result.video is None
    assert len(result.returns) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "No video of toy: no OpenGL context; the run goes on without it."
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_encoder_costs_one_sentence_and_the_film_only(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "imageio", None)
    with caplog.at_level(logging.WARNING):
        result = evaluate(ToyPolicy(), toy_task(), episodes=2, record=1, video=tmp_path / "video.mp4")
    assert result.video is None
    assert len(caplog.records) == 1
    assert "goes on without it" in caplog.text

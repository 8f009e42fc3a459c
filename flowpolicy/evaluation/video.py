"""Videos of episodes: frames of the simulator with a line of text, as an mp4 that any browser plays."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.evaluation.task import Task
from flowpolicy.files.storage import atomic_file

log = logging.getLogger(__name__)

MAX_FPS = 30.0
_CAPTION_HEIGHT = 28
_MIN_WIDTH = 320
_HOLD_SECONDS = 0.5

Frame = NDArray[np.uint8]


def frame_timing(control_hz: float) -> tuple[int, float]:
    """Every how many-th step is a frame, and the frames per second that make the video real time.

    At most 30 frames per second are kept: of Hopper at 125 Hz every fifth step, 25 per second.
    """
    stride = max(1, math.ceil(control_hz / MAX_FPS - 1e-9))
    return stride, control_hz / stride


class EpisodeVideo:
    """Records one environment, episode after episode, into one H.264 file in real time.

    Whatever is missing (a GL library, ffmpeg, a render method) costs one logged sentence and the video,
    never the run.

    Args:
        path: the mp4; it appears when :meth:`close` is called, whole or not at all.
        task: gives the environment and the control rate.
        caption: first words of the line under the picture; the episode's return so far follows.
    """

    def __init__(self, path: Path | str, task: Task, caption: str = "") -> None:
        self.path = Path(path)
        self.task = task
        self.caption = caption
        self.frames = 0
        self.stride, self.fps = frame_timing(task.control_hz)
        self._writer: Any = None
        self._files = contextlib.ExitStack()
        self._off = False

    def make(self) -> Any:
        """Make the task's environment so that it renders frames, or plainly where that cannot be."""
        from flowpolicy.evaluation.rendering import NO_GL_BACKEND, choose_gl_backend

        logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it announces an optional module it lacks
        backend = choose_gl_backend()
        try:
            environment = self.task.make(render_mode="rgb_array")
            if backend is None and hasattr(environment.unwrapped, "mujoco_renderer"):
                self._give_up(RuntimeError(NO_GL_BACKEND))
                return environment
            follow_robot(environment)
            return environment
        except Exception as error:
            self._give_up(error)
            return self.task.make()

    def capture(self, env: Any, step: int, total: float, *, last: bool = False) -> None:
        """Record the present state when a frame is due; the last one of an episode is held for a moment."""
        if self._off or (step % self.stride and not last):
            return
        try:
            rendered = env.render()
            if rendered is None:
                raise RuntimeError("the environment renders no frames")
            frame = captioned(rendered, f"{self.caption}  return {total:.1f}  step {step}")
            for _ in range(1 + (round(_HOLD_SECONDS * self.fps) if last else 0)):
                self._write(frame)
        except Exception as error:  # whatever a driver or an encoder throws: the evaluation is worth more
            self._give_up(error)

    def close(self) -> Path | None:
        """Finish the file.

        Returns:
            Its path, or None where nothing was recorded.
        """
        if self._writer is None:
            return None
        self._writer = None
        try:
            self._files.close()
        except Exception as error:
            self._give_up(error)
            return None
        return self.path

    def _write(self, frame: Frame) -> None:
        if self._writer is None:
            partial = self._files.enter_context(atomic_file(self.path))
            self._writer = self._files.enter_context(_writer(partial, self.fps))
        self._writer.append_data(frame)
        self.frames += 1

    def _give_up(self, error: Exception) -> None:
        self._off = True
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("No video of %s: %s; the run goes on without it.", self.task.name, reason.rstrip("."))
        self._writer = None
        with contextlib.suppress(Exception):  # it is given up already
            self._files.__exit__(type(error), error, error.__traceback__)


def side_by_side(left: Path, right: Path, path: Path, *, titles: tuple[str, str]) -> Path | None:
    """Join two videos of one task; the shorter one holds its last frame.

    Args:
        left: an mp4 of :class:`EpisodeVideo`.
        right: another, of the same frame rate and height.
        path: the joined mp4; whole or not at all.
        titles: a line over each.

    Returns:
        ``path``, or None where it could not be made, which costs one logged sentence.
    """
    try:
        import imageio

        readers = [imageio.get_reader(video, format="FFMPEG") for video in (left, right)]
        videos = [list(reader.iter_data()) for reader in readers]
        fps = readers[0].get_meta_data()["fps"]
        with atomic_file(path) as partial, _writer(partial, fps) as writer:
            for number in range(max(map(len, videos))):
                halves = []
                for frames, title in zip(videos, titles, strict=True):
                    frame = np.asarray(frames[min(number, len(frames) - 1)])
                    bar = _text_bar(title, frame.shape[1])
                    halves.append(frame if bar is None else np.concatenate([bar, frame]))
                writer.append_data(np.concatenate(halves, axis=1))
    except Exception as error:  # whatever a codec throws: the run is worth more
        log.warning("No joined video: %s; the two videos stand beside it.", " ".join(str(error).split()))
        return None
    return path


def _writer(path: Path, fps: float) -> Any:
    """An H.264 writer whose file every browser plays."""
    import imageio

    return imageio.get_writer(
        path,
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        macro_block_size=2,
        output_params=["-movflags", "+faststart", "-crf", "23"],
        ffmpeg_log_level="error",
    )


def follow_robot(environment: Any) -> None:
    """Render through the model's camera ``track``, where it has one: a free camera lets the robot run off."""
    renderer = getattr(environment.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        import mujoco

        camera = mujoco.mj_name2id(environment.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if camera >= 0:
            renderer.camera_id = camera


def captioned(frame: NDArray[Any], text: str) -> Frame:
    """The frame with a line of text under it and even sides; small frames are enlarged first.

    Args:
        frame: (height, width, 3) uint8.
        text: one line; left out where Pillow is not installed.

    Returns:
        (height', width', 3) uint8, both even, as H.264 needs.
    """
    picture: Frame = np.asarray(frame, dtype=np.uint8)
    scale = max(1, math.ceil(_MIN_WIDTH / picture.shape[1]))
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    bar = _text_bar(text, picture.shape[1])
    if bar is not None:
        picture = np.concatenate([picture, bar])
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _text_bar(text: str, width: int) -> Frame | None:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return None
    image = Image.new("RGB", (width, _CAPTION_HEIGHT), (24, 24, 28))
    draw = ImageDraw.Draw(image)
    size = 15
    font: Any = ImageFont.load_default(size)
    while size > 8 and draw.textlength(text, font=font) > width - 16:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text((8, _CAPTION_HEIGHT / 2), text, fill=(235, 235, 235), font=font, anchor="lm")
    return np.asarray(image, dtype=np.uint8)

"""Frames of a video at given times, decoded with PyAV one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import first_line, reading_error
from flowpolicy.errors import DataError
from flowpolicy.optional import optional

CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
"""What is decoded; others are refused before any decoder sees a stranger's bytes."""
_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}
_PIXELS = {1: "gray", 3: "rgb24", 4: "rgba"}
_JUMP_SECONDS = 2.0  # forward: from here on a jump to a key frame is cheaper than decoding what lies between
_REORDERING_SECONDS = 1.0  # a key frame is looked for so much earlier, as files sort frames by decoding time
_MOST_STREAMS = 64
_PADDING = 256  # a decoder rounds each side up to whole coding blocks and adds a border


class Video:
    """A video file of which the header has been read and compared with what is declared.

    Args:
        path: the file.
        shape: of its frames, ``(height, width, channels)``; the decoder allocates no larger ones, whatever
            the file says later on.

    Raises:
        DataError: a missing or damaged file, an unknown codec, or frames of another size.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        with optional(f"{path} needs PyAV to be decoded", "import", DataError):
            import av
        self.path, self._shape = path, shape
        container = _CONTAINERS.get(path.suffix.lower())
        if container is None:
            raise DataError(f"{path} is no video that is read here; convert it to MP4.")
        if not path.is_file():
            raise DataError(f"There is no video {path}; copy the dataset again, or leave its key out.")
        height, width = shape[:2]
        limit = {"max_pixels": str((height + _PADDING) * (width + _PADDING))}
        with self._explained():
            # The format is fixed, as others (playlists) may name further files or addresses. Opening decodes
            # a frame of each stream, of whatever size the stream itself says.
            self._container = av.open(
                f"file:{path}",
                format=container,
                options={"protocol_whitelist": "file"},
                stream_options=[limit] * _MOST_STREAMS,
            )
            try:
                self._stream = self._checked_stream()
                self._stream.codec_context.options = limit
            except BaseException:
                self._container.close()
                raise
        self._frames: Iterator[Any] = iter(())
        self._before: Any = None
        self._after: Any = None
        self._reached = -np.inf

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()

    @property
    def declared_frames(self) -> int:
        """Frames that the header counts; 0 where it does not."""
        return int(self._stream.frames)

    def frames(self, times: NDArray[np.float64], tolerance: float) -> Iterator[NDArray[np.uint8]]:
        """The frame ``(height, width, channels)`` that is shown nearest to each time, in seconds.

        Args:
            times: ``(frames,)``; cheapest where they increase.
            tolerance: seconds that a frame may lie off.

        Raises:
            DataError: no frame there, or damaged ones.
        """
        for time in times.tolist():
            with self._explained():
                frame = self._nearest(time)
            if frame is None or abs(frame.time - time) > tolerance:
                where = "no frame" if frame is None else f"none nearer than {frame.time:.3f} s"
                raise DataError(
                    f"{self.path} has no frame at {time:.3f} s ({where}), where a step needs one; it is cut "
                    "off or damaged, so copy it again, or leave its key out."
                )
            if frame.is_corrupt:
                raise DataError(
                    f"{self.path} is damaged at {time:.3f} s; copy it again, or leave its key out."
                )
            yield self._pixels(frame)

    def _checked_stream(self) -> Any:
        if not self._container.streams.video:
            raise DataError(f"{self.path} holds no video; copy it again.")
        stream = self._container.streams.video[0]
        context = stream.codec_context
        if context is None or context.name.removeprefix("lib").replace("dav1d", "av1") not in CODECS:
            name = "unknown" if context is None else context.name
            raise DataError(f"{self.path} has the codec {name}; encode it as one of {', '.join(CODECS)}.")
        height, width = self._shape[:2]
        if (context.height, context.width) != (height, width):
            raise DataError(
                f"{self.path} declares frames of {context.height} x {context.width} pixels and the dataset "
                f"declares {height} x {width}; copy the right file."
            )
        stream.thread_type = "AUTO"
        return stream

    def _nearest(self, time: float) -> Any:
        if time < self._reached or time > self._reached + _JUMP_SECONDS:
            self._jump(time)
        while self._after is None or self._after.time < time:
            following = next(self._frames, None)
            if following is None:
                break
            if following.time is not None:  # without a time it cannot be told which step it belongs to
                self._before, self._after = self._after, following
        self._reached = time
        found = [frame for frame in (self._before, self._after) if frame is not None]
        return min(found, key=lambda frame: abs(frame.time - time), default=None)

    def _jump(self, time: float) -> None:
        self._before = self._after = None
        at = max(0.0, time - _REORDERING_SECONDS)
        if at > 0 or self._reached > -np.inf:
            self._container.seek(int(at / self._stream.time_base), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)

    def _pixels(self, frame: Any) -> NDArray[np.uint8]:
        height, width, channels = self._shape
        if (frame.height, frame.width) != (height, width):
            raise DataError(
                f"{self.path} changes from {height} x {width} to {frame.height} x {frame.width} pixels; "
                "copy it again."
            )
        with self._explained():
            values = frame.to_ndarray(format=_PIXELS[channels])
        return np.asarray(values).reshape(self._shape)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever PyAV raises inside the block becomes one sentence."""
        try:
            yield
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # PyAV raises a class for each of FFmpeg's codes, and plain ones
            if "Invalid data" in str(error) or "moov" in str(error):
                raise DataError(
                    f"{self.path} is cut off, damaged or no video ({first_line(error)}); copy it again."
                ) from error
            raise reading_error(error, self.path, "cannot be decoded") from error

"""Frames as a video file, encoded with PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import DataError
from flowpolicy.optional import optional

ENCODERS = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
_QUALITY = {"h264": 18, "hevc": 20, "av1": 24}  # hardly to be told from the original
_OPTIONS = {
    "h264": {"preset": "fast"},
    "hevc": {"preset": "fast", "x265-params": "log-level=error"},
    "av1": {"preset": "8"},
}
_KEY_FRAMES = "2"  # every second frame: any one is decoded at once, which training does in random order


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float, codec: str) -> None:
    """Encode frames ``(height, width, 3)``, with even sides, the n-th shown at n / ``fps`` seconds.

    Raises:
        DataError: PyAV is missing or lacks the encoder.
    """
    with optional(f"{path} needs PyAV to be written", "import", DataError):
        import av
    rate = Fraction(fps).limit_denominator(10_000)
    with av.open(str(path), "w") as container:
        try:
            stream: Any = container.add_stream(ENCODERS[codec], rate=rate)
        except (ValueError, av.FFmpegError) as error:
            raise DataError(
                f"This PyAV has no encoder for {codec}; choose another of {', '.join(ENCODERS)}."
            ) from error
        stream.pix_fmt = "yuv420p"
        stream.options = {**_OPTIONS[codec], "crf": str(_QUALITY[codec]), "g": _KEY_FRAMES}
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

"""Frames as a video file, encoded with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def fair_scheduling() -> Iterator[None]:
    """Give back the scheduling that an encoder takes for itself where it is opened in this block.

    Where root runs it, SVT-AV1 puts the thread that opens it, and so all that it starts, at the highest
    real-time priority and leaves it there (Linux). Other programs then get no core any more, and what this
    one starts later inherits it.
    """
    before = _scheduling()
    try:
        yield
    finally:
        for thread, now in _scheduling().items():
            earlier = before.get(thread, (os.SCHED_OTHER, os.sched_param(0)))
            if now != earlier:
                with suppress(OSError):  # it has ended
                    os.sched_setscheduler(thread, *earlier)


def _scheduling() -> dict[int, tuple[int, os.sched_param]]:
    """Policy and priority of each thread of this process; nothing where they cannot be told."""
    found = {}
    threads = Path("/proc/self/task")
    for path in threads.iterdir() if threads.is_dir() else ():
        with suppress(OSError):
            thread = int(path.name)
            found[thread] = os.sched_getscheduler(thread), os.sched_getparam(thread)
    return found


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
                with fair_scheduling():
                    container.start_encoding()
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

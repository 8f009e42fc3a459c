"""The videos of a LeRobot dataset: where each episode lies, and the frames of its steps."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers import parquet
from flowpolicy.data.videos import Video
from flowpolicy.errors import DataError

_EPISODE = "episode_index"
_VIDEO_PATH = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
_FIELD = re.compile(r"\{(\w+)(?::0?(\d)d)?\}")


@dataclass(frozen=True)
class Place:
    """Where an episode's frames lie: in which file, and from which second on."""

    path: Path
    start: float


class VideoPlaces:
    """The files of a dataset's videos: one an episode (layout 2), or several episodes in one (layout 3)."""

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self._folder, self._info = folder, info
        self._layout = 3 if (folder / "meta" / "episodes").is_dir() else 2

    def of(self, key: str, episodes: Sequence[int]) -> list[Place]:
        """The places of one camera's episodes.

        Raises:
            DataError: an episode whose place is not given, or a file that is missing.
        """
        files = self._of_layout_3(key, episodes) if self._layout == 3 else self._of_layout_2(key, episodes)
        for place, episode in zip(files, episodes, strict=True):
            if not place.path.is_file():
                raise DataError(
                    f"There is no video {place.path} for '{key}' of episode {episode}; copy the dataset "
                    "again, or leave the key out with keys=[...]."
                )
        return files

    def _of_layout_2(self, key: str, episodes: Sequence[int]) -> list[Place]:
        size = self._info.get("chunks_size")
        size = size if type(size) is int and size > 0 else 1000
        return [
            Place(self._path(video_key=key, episode_index=n, episode_chunk=n // size), 0.0) for n in episodes
        ]

    def _of_layout_3(self, key: str, episodes: Sequence[int]) -> list[Place]:
        names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        found: dict[int, Place] = {}
        for file in sorted((self._folder / "meta" / "episodes").rglob("*.parquet")):
            table = parquet.Table(file)
            columns = [*table.integers([_EPISODE, *names[:2]]).values(), table.numbers(names[2:])[names[2]]]
            for episode, chunk, number, start in zip(*(column.tolist() for column in columns), strict=True):
                path = self._path(video_key=key, chunk_index=chunk, file_index=number)
                found[episode] = Place(path, float(start))
        for episode in episodes:
            if episode not in found or not math.isfinite(found[episode].start):
                raise DataError(
                    f"{self._folder}/meta/episodes does not say where '{key}' of episode {episode} lies; "
                    "copy the dataset again, or leave the key out with keys=[...]."
                )
        return [found[episode] for episode in episodes]

    def _path(self, **values: Any) -> Path:
        """The file by the dataset's own pattern, which must not lead out of its folder."""
        pattern = self._info.get("video_path")
        pattern = pattern if isinstance(pattern, str) else _VIDEO_PATH[self._layout]

        def value(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise DataError(f"{self._folder}: video_path '{pattern}' names '{match[1]}'; copy it again.")
            return f"{values[match[1]]:0{match[2]}d}" if match[2] else str(values[match[1]])

        path = PurePosixPath(_FIELD.sub(value, pattern))
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{self._folder}: video_path '{pattern}' leads out of the dataset; repair it.")
        return self._folder / path


@dataclass(frozen=True)
class Camera:
    """One camera's frames over all episodes.

    Attributes:
        name: of the camera.
        places: of the episodes.
        times: of the steps of all episodes, in seconds since the beginning of their episode, ``(steps,)``.
        ends: of the episodes, ``(episodes,)``.
        shape: of a frame.
        tolerance: seconds that a frame may lie off its step.
    """

    name: str
    places: Sequence[Place]
    times: NDArray[np.float64]
    ends: NDArray[np.int64]
    shape: tuple[int, ...]
    tolerance: float

    def check(self) -> None:
        """Look at the header of every file, before the first frame is decoded.

        Raises:
            DataError: a damaged video, one of another size, or with fewer frames than there are steps.
        """
        steps: Counter[Path] = Counter()
        for place, length in zip(self.places, np.diff(self.ends, prepend=0).tolist(), strict=True):
            steps[place.path] += length
        for path, wanted in steps.items():
            with contextlib.closing(Video(path, self.shape)) as video:
                found = video.declared_frames
            if 0 < found < wanted:
                raise DataError(
                    f"{path} has {found} frames for the {wanted} steps of '{self.name}'; copy the dataset "
                    "again, or leave the key out with keys=[...]."
                )

    def blocks(self, rows: int, after: int = 0) -> Generator[NDArray[np.uint8]]:
        """The frames of ``rows`` steps at a time, ``(rows, height, width, channels)``, without those of the
        first ``after`` episodes.

        Raises:
            DataError: a damaged video, or one without a frame for a step.
        """
        with contextlib.ExitStack() as stack:
            video: Video | None = None
            pending: list[NDArray[np.uint8]] = []
            bounds = [0, *self.ends.tolist()]
            for episode in range(after, len(self.places)):
                place, (start, end) = self.places[episode], bounds[episode : episode + 2]
                if video is None or video.path != place.path:
                    stack.close()
                    video = stack.enter_context(contextlib.closing(Video(place.path, self.shape)))
                for frame in video.frames(place.start + self.times[start:end], self.tolerance):
                    pending.append(frame)
                    if len(pending) == rows:
                        yield np.stack(pending)
                        pending = []
            if pending:
                yield np.stack(pending)

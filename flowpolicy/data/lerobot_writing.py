"""Demonstrations as a LeRobot dataset of layout 3.0, which lerobot itself loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.lerobot import KEYS
from flowpolicy.data.keys import NOT_OBSERVED, TASK_INDEX
from flowpolicy.data.lerobot_statistics import (
    depth_sample,
    pixel_counts,
    pixel_statistics,
    vector_statistics,
)
from flowpolicy.data.lerobot_tables import (
    DATA_PATH,
    FILE_BYTES,
    FILES_A_CHUNK,
    Tables,
    column,
    png_file,
    task_table,
)
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.store_writing import check_new
from flowpolicy.data.task_texts import written_tasks
from flowpolicy.data.video_writing import ENCODERS, write_video
from flowpolicy.errors import DataError
from flowpolicy.features import Depth
from flowpolicy.features.undeclared import Kind
from flowpolicy.files.storage import atomic_folder
from flowpolicy.optional import optional
from flowpolicy.runs.progress import progress
from flowpolicy.settings import require

logger = logging.getLogger(__name__)

_OWN = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
_SAMPLED = 100  # frames of an episode that its statistics look at
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def write_lerobot(
    path: Path | str,
    demos: Demonstrations,
    *,
    images: str = "png",
    fps: float | None = None,
    task: str | None = None,
) -> Path:
    """Write a dataset's folder: tables, videos, the tasks in words, statistics; returns its path.

    ``observation`` becomes ``observation.state``, every other observation ``observation.<key>``, ``reward``
    ``next.reward``. The demonstrations' attributes are kept in ``meta/info.json``, so that an import gives
    them back.

    Args:
        path: the new folder.
        demos: what to write.
        images: ``png`` loses nothing; ``h264``, ``hevc`` and ``av1`` are videos, smaller and lossy.
        fps: steps a second; None takes the demonstrations' attribute.
        task: in words, where the demonstrations name none.

    Raises:
        DataError: there is no rate, a package is missing, ``path`` exists, or images that no video can hold.
    """
    with optional(f"{path} needs pyarrow to be written", "import", DataError):
        import pyarrow  # noqa: F401
    require(images == "png" or images in ENCODERS, "images", images, f"png or one of {', '.join(ENCODERS)}")
    rate = demos.attributes.get("fps") if fps is None else fps
    if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise DataError(f"{demos.source} does not say its rate; give the steps a second with fps=....")
    path = check_new(path)
    with atomic_folder(path) as folder:
        _Writer(folder, demos, images, float(rate), task).write()
    return path


class _Writer:
    def __init__(
        self, folder: Path, demos: Demonstrations, images: str, fps: float, task: str | None
    ) -> None:
        self._folder, self._demos, self._fps = folder, demos, fps
        self._codec = None if images == "png" else images
        self._arrays = {_name(key): array for key, array in demos.arrays.items()}
        for name in [name for name in self._arrays if name in _OWN]:
            logger.warning("%s: '%s' is left out, as LeRobot counts its own.", demos.source, name)
            del self._arrays[name]
        kinds = {_name(key): demos.feature(key).name for key in demos.arrays if key not in NOT_OBSERVED}
        self._cameras = {name for name, kind in kinds.items() if kind == Kind.IMAGE}
        self._maps = {name for name, kind in kinds.items() if kind == Depth.name}
        for key in demos.arrays:
            if _name(key) in self._cameras:
                demos.feature(key).check_declaration(key)
        if self._codec is not None:
            for name in sorted(self._cameras):
                height, width, channels = self._arrays[name].shape[1:]
                if height % 2 or width % 2 or channels != 3:
                    raise DataError(
                        f"{demos.source}: '{name}' has images of {height} x {width} pixels and {channels} "
                        "channels; a video needs even sides and 3 channels, so choose images=png."
                    )
        words = task or demos.attributes.get("task") or demos.attributes.get("env_id") or "unknown"
        self._tasks = written_tasks(demos.attributes, demos.source) or [str(words)]
        self._added = [TASK_INDEX] if TASK_INDEX not in self._arrays and task is None else []
        if TASK_INDEX not in self._arrays:
            self._arrays[TASK_INDEX] = np.zeros(demos.num_steps, np.int64)
        highest = int(self._arrays[TASK_INDEX].max())
        if int(self._arrays[TASK_INDEX].min()) < 0 or highest >= len(self._tasks):
            raise DataError(
                f"{demos.source}: 'task_index' reaches {highest} and the attribute 'tasks' names "
                f"{len(self._tasks)}; name them all."
            )

    def write(self) -> None:
        """The episodes one after another, then what describes them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        starts, ends = self._demos.episode_starts.tolist(), self._demos.episode_ends.tolist()
        counts = {name: np.zeros((self._arrays[name].shape[-1], 256), np.int64) for name in self._cameras}
        depths: dict[str, list[NDArray[Any]]] = {name: [] for name in self._maps}
        looked_at, rows = 0, []
        with Tables(self._folder) as tables:
            for episode in progress(range(len(ends)), "write demonstrations"):
                start, end = starts[episode], ends[episode]
                columns = self._columns(episode, start, end)
                number = tables.append(pa.table({name: column(values) for name, values in columns.items()}))
                row = self._row(episode, start, end, number)
                sampled = np.unique(np.linspace(start, end - 1, min(_SAMPLED, end - start)).astype(int))
                looked_at += len(sampled)
                numbers = {name: v for name, v in columns.items() if name not in self._cameras}
                for name in self._maps:
                    numbers[name] = depth_sample(self._arrays[name], sampled)
                    depths[name].append(numbers[name])
                statistics = {name: vector_statistics(values) for name, values in numbers.items()}
                for name in sorted(self._cameras):
                    array = self._arrays[name]
                    found = pixel_counts((array[step] for step in sampled), array.shape[-1])
                    counts[name] += found
                    statistics[name] = pixel_statistics(found, len(sampled))
                    if self._codec is not None:
                        row |= self._video(name, episode, start, end)
                for name, found_statistics in statistics.items():
                    row |= {f"stats/{name}/{kind}": value for kind, value in found_statistics.items()}
                rows.append({**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        meta = self._folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(task_table(self._tasks), meta / "tasks.parquet")
        whole = {
            name: vector_statistics(values)
            for name, values in {
                **self._arrays,
                **self._bookkeeping(),
                **{name: np.concatenate(found) for name, found in depths.items()},
            }.items()
            if name not in self._cameras
        }
        whole |= {name: pixel_statistics(found, looked_at) for name, found in counts.items()}
        (meta / "stats.json").write_text(json.dumps(whole, indent=2))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=2))

    def _bookkeeping(self) -> dict[str, NDArray[Any]]:
        lengths = self._demos.episode_lengths
        frame = np.concatenate([np.arange(length) for length in lengths])
        return {
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.repeat(np.arange(len(lengths)), lengths),
            "index": np.arange(len(frame)),
        }

    def _columns(self, episode: int, start: int, end: int) -> dict[str, Any]:
        """The episode's rows of every column: arrays, and PNG files as bytes."""
        columns: dict[str, Any] = {}
        for name, array in self._arrays.items():
            if name not in self._cameras:
                columns[name] = array[start:end]
            elif self._codec is None:
                columns[name] = [png_file(image) for image in array[start:end]]
        frame = np.arange(end - start)
        return columns | {
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(end - start, episode),
            "index": frame + start,
        }

    def _row(self, episode: int, start: int, end: int, number: int) -> dict[str, Any]:
        tasks = dict.fromkeys(self._arrays[TASK_INDEX][start:end].reshape(-1).tolist())
        return {
            "episode_index": episode,
            "tasks": [self._tasks[task] for task in tasks],
            "length": end - start,
            "data/chunk_index": number // FILES_A_CHUNK,
            "data/file_index": number % FILES_A_CHUNK,
            "dataset_from_index": start,
            "dataset_to_index": end,
        }

    def _video(self, name: str, episode: int, start: int, end: int) -> dict[str, Any]:
        """A video of its own for each episode, and where it lies."""
        place = {"chunk_index": episode // FILES_A_CHUNK, "file_index": episode % FILES_A_CHUNK}
        path = self._folder / _VIDEO.format(video_key=name, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = self._arrays[name]
        write_video(path, (array[step] for step in range(start, end)), self._fps, str(self._codec))
        found = {**place, "from_timestamp": 0.0, "to_timestamp": (end - start) / self._fps}
        return {f"videos/{name}/{key}": value for key, value in found.items()}

    def _info(self) -> dict[str, Any]:
        demos = self._demos
        names = demos.attributes.get("dimension_names") or {}
        features = {name: self._feature(name, array, names) for name, array in self._arrays.items()}
        features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _OWN.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": demos.attributes.get("robot_type"),
            "total_episodes": demos.num_episodes,
            "total_frames": demos.num_steps,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_A_CHUNK,
            "data_files_size_in_mb": FILE_BYTES >> 20,
            "video_files_size_in_mb": 200,
            "fps": int(self._fps) if self._fps.is_integer() else self._fps,
            "splits": {"train": f"0:{demos.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": _VIDEO if self._codec and self._cameras else None,
            "features": features,
            "attributes": json.loads(json.dumps(demos.attributes, default=str)),
            "added": self._added,
        }

    def _feature(self, name: str, array: NDArray[Any], names: Mapping[str, Any]) -> dict[str, Any]:
        shape = list(array.shape[1:]) or [1]
        if name not in self._cameras:
            return {"dtype": str(array.dtype), "shape": shape, "names": names.get(name)}
        axes = ["height", "width", "channels"]
        if self._codec is None:
            return {"dtype": "image", "shape": shape, "names": axes}
        info = {
            "video.height": shape[0], "video.width": shape[1], "video.channels": shape[2],
            "video.codec": self._codec, "video.pix_fmt": "yuv420p", "video.is_depth_map": False,
            "video.fps": self._fps, "has_audio": False,
        }  # fmt: skip
        return {"dtype": "video", "shape": shape, "names": axes, "info": info}


def _name(key: str) -> str:
    """LeRobot's name of a store's key, which :data:`KEYS` and the importer turn back."""
    own = {ours: theirs for theirs, ours in KEYS.items()}
    if key in own:
        return own[key]
    name = f"observation.{key}"
    is_plain = key in NOT_OBSERVED or key in _OWN or name in KEYS
    return key if is_plain else name

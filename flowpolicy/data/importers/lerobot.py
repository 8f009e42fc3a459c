"""LeRobot datasets: ``meta/info.json`` and ``data/**/*.parquet``, layouts 2.0, 2.1 and 3.0."""

from __future__ import annotations

import contextlib
import glob
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.encoded_images import decode_images
from flowpolicy.data.importers import parquet
from flowpolicy.data.importers.lerobot_meta import dimension_names, image_shape, read_tasks, statistics
from flowpolicy.data.importers.lerobot_order import EPISODE, FRAME, Order
from flowpolicy.data.importers.lerobot_videos import Camera, VideoPlaces
from flowpolicy.data.importers.registry import importer
from flowpolicy.data.importers.source import BLOCK_BYTES, Block, Feature, Source, json_object
from flowpolicy.data.keys import TASK_INDEX, TASKS
from flowpolicy.data.prefetch import read_ahead
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind
from flowpolicy.files.hub import download_dataset
from flowpolicy.optional import optional
from flowpolicy.runs.progress import progress_bar

logger = logging.getLogger(__name__)
_TIME = "timestamp"
_BOOKKEEPING = {EPISODE, FRAME, _TIME, "index"}
KEYS = {
    "observation.state": "observation",
    "next.reward": "reward",
    "next.done": "done",
    "next.terminated": "terminated",
    "next.truncated": "truncated",
}
"""What a store calls LeRobot's features; others lose ``observation.``."""
_MOST_FRAMES = 64  # of a camera in a block, of which two wait while a third is decoded


@importer("lerobot", lambda contents: contents.has("meta/info.json"))
def open_lerobot(path: Path, episodes: Iterable[int] | None = None) -> Iterator[Source]:
    """A LeRobot dataset: its folder, or the repository id of one on the Hugging Face Hub.

    ``observation.state`` becomes ``observation``, ``observation.<key>`` becomes ``<key>``, ``next.reward``
    becomes ``reward``. Kinds and shapes are those that ``meta/info.json`` declares. Images and videos become
    images; only those that are chosen are fetched and decoded. Times are compared with the declared rate.
    The words of the tasks stand in the attribute ``tasks``, the number of each step's task in ``task_index``.

    Args:
        path: folder, or repository id such as ``lerobot/pusht``.
        episodes: indices of those to be read; None reads all that are there.

    Raises:
        DataError: a damaged or incomplete dataset.
    """
    with optional(f"{path} needs pyarrow to be read", "import", DataError):
        import pyarrow  # noqa: F401 - known before anything is fetched
    folder = _find_folder(path)
    description = folder / "meta" / "info.json"
    if not description.is_file():
        raise DataError(
            f"There is no {description}; give the LeRobot dataset's folder, the one with meta/info.json."
        )
    info = json_object(description)
    specs = info.get("features", {})
    if not isinstance(specs, dict):
        raise DataError(f"{description} must hold a JSON object with 'features'; copy the dataset again.")
    files = sorted(file for file in (folder / "data").rglob("*.parquet") if file.is_file())
    if not files:
        raise DataError(f"{folder} has no data/**/*.parquet; copy the dataset again.")
    tables = [parquet.Table(file) for file in files]
    added = info.get("added")  # the words that a store had not, which was exported
    tasks = None if isinstance(added, list) and TASK_INDEX in added else _tasks(folder)
    features = _features(tables, specs, tasks is not None)
    for key in (EPISODE, FRAME):
        if key not in features:
            has = ", ".join(f"'{name}'" for name in features)
            raise DataError(
                f"{folder}/data has no column '{key}' (it has {has}); layouts 2 and 3 can be read."
            )
    hub_id = None if path.is_dir() else str(path)
    videos = {name for name, feature in features.items() if feature.shape and _is_video(specs.get(name))}
    for name in [name for name in videos if hub_id is None and not _has_video(folder, name)]:
        features[name] = replace(features[name], kind=Kind.ENCODED, note="has no videos beside the tables")
    order = Order(tables, info, str(folder), episodes)
    attributes = _attributes(path, folder, info, specs, tasks)
    if episodes is not None:
        attributes.pop("masks", None)  # they number all episodes
    times = features.get(_TIME)
    yield _Dataset(
        str(folder), features, order.names, attributes, action="action",
        timestamps=_TIME if times is not None and not times.problem else None,
        tables=tables, order=order, info=info, videos=videos, hub_id=hub_id,
    )  # fmt: skip


def _find_folder(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{path} is a file; give the LeRobot dataset's folder, the one with meta/info.json.")
    if path.is_absolute() or str(path).count("/") != 1:
        raise DataError(f"There is no LeRobot dataset at {path}; check the path.")
    return download_dataset(str(path), ["meta/*", "data/*"])


def _tasks(folder: Path) -> list[str] | None:
    """The tasks in words; none, with a line in the log, where what lists them is broken."""
    try:
        return read_tasks(folder)
    except DataError as error:
        logger.warning("The tasks are left out, as their list is broken: %s", error)
        return None


def _attributes(
    path: Path, folder: Path, info: dict[str, Any], specs: dict[str, Any], tasks: list[str] | None
) -> dict[str, Any]:
    own = info.get("attributes")  # of a store that was exported
    attributes = dict(own) if isinstance(own, dict) else {}
    attributes |= {
        "imported_from": str(path),
        "lerobot_version": str(info.get("codebase_version", "unknown")),
    }
    for name in ("fps", "robot_type"):
        if info.get(name) is not None:
            attributes[name] = info[name]
    names = {
        feature: dimension_names(spec)
        for feature, spec in specs.items()
        if isinstance(spec, dict) and spec.get("dtype") not in ("image", "video")
    }
    found = {
        "dimension_names": {feature: listed for feature, listed in names.items() if listed},
        "lerobot_stats": statistics(folder),
        TASKS: tasks,
    }
    return attributes | {name: content for name, content in found.items() if content}


def _features(tables: Sequence[parquet.Table], specs: dict[str, Any], has_tasks: bool) -> dict[str, Feature]:
    """The columns of all files and the videos beside them, by what is declared and how they are stored."""
    types: dict[str, Any] = {}
    for table in tables:
        types = {**table.types, **types}
    features = {}
    for name in (*types, *(other for other in specs if other not in types)):
        spec = specs[name] if isinstance(specs.get(name), dict) else {}
        key = KEYS.get(name, name.removeprefix("observation."))
        default = name not in _BOOKKEEPING and (has_tasks or name != TASK_INDEX)
        if _is_video(spec) or spec.get("dtype") == "image":
            features[name] = _camera(name, key, types.get(name), spec)
        elif name in types:
            features[name] = _feature(name, key, types[name], spec, default)
    return features


def _camera(name: str, key: str, stored: Any, spec: dict[str, Any]) -> Feature:
    """Images in a column, or frames of videos beside the tables."""
    shape, details = image_shape(spec), spec.get("info")
    note = ""
    if isinstance(details, dict) and details.get("video.is_depth_map") is True:
        note = "is a depth map in a video, which is not read"
    elif shape is None:
        note = "declares no shape of images"
    elif spec["dtype"] == "image" and (stored is None or parquet.kind_of_type(stored)[0] is not Kind.ENCODED):
        note = "is declared an image and not stored as one"
    return Feature(name, key, Kind.ENCODED if note else Kind.IMAGE, shape, note=note)


def _is_video(spec: Any) -> bool:
    return isinstance(spec, dict) and spec.get("dtype") == "video"


def _has_video(folder: Path, name: str) -> bool:
    """Whether a single video of a camera is there, in either layout; only the tables may have been copied."""
    name = glob.escape(name)
    return any(any((folder / "videos").glob(pattern)) for pattern in (f"{name}/*/*", f"*/{name}/*"))


def _feature(name: str, key: str, stored: Any, spec: dict[str, Any], default: bool) -> Feature:
    kind, dtype = parquet.kind_of_type(stored)
    shape = spec.get("shape")
    is_shape = isinstance(shape, (list, tuple)) and all(type(n) is int and n > 0 for n in shape)
    if dtype is None or not is_shape:  # an undeclared shape: the rows themselves say it when they are read
        return Feature(name, key, kind, default=default, note="holds text" if kind is Kind.TEXT else "")
    feature = Feature.of_array(name, key, dtype, tuple(shape or ()), default)
    axes = spec.get("names")
    if feature.kind == Kind.IMAGE and isinstance(axes, (list, tuple)) and len(axes) == 3:
        return replace(feature, channels_first=str(axes[0]).startswith("channel"))
    return feature


@dataclass
class _Dataset(Source):
    tables: list[parquet.Table] = field(kw_only=True)
    order: Order = field(kw_only=True)
    info: Mapping[str, Any] = field(kw_only=True)
    videos: set[str] = field(kw_only=True)
    hub_id: str | None = field(kw_only=True)

    def lengths(self, action: str) -> NDArray[np.int64]:
        return self.order.lengths

    def read(self, names: Sequence[str], lengths: NDArray[np.int64], after: int = 0) -> Iterator[Block]:
        """The columns in blocks; each video is decoded by a thread of its own, a few blocks ahead."""
        cameras = self._cameras([name for name in names if name in self.videos])
        columns = [name for name in names if name not in cameras] or [FRAME]
        shapes = [feature.shape or () for name, feature in self.features.items() if name in names]
        sizes = [int(np.prod(shape)) for shape in shapes if len(shape) == 3]
        rows = max(1, min(_MOST_FRAMES, BLOCK_BYTES // sum(sizes))) if sizes else None
        start = int(lengths[:after].sum())
        bar = progress_bar(int(lengths.sum()), "read demonstrations", done=start)
        with contextlib.ExitStack() as stack, bar:
            frames = {
                name: stack.enter_context(
                    contextlib.closing(read_ahead(camera.blocks(rows or 1, after), ahead=2))
                )
                for name, camera in cameras.items()
            }
            found = self._rows(columns, start)
            for stored in found if rows is None else _cut(found, rows):
                block = {name: self._declared(name, values) for name, values in stored.items()}
                block |= {name: next(images) for name, images in frames.items()}
                yield Block(start, block)
                count = len(next(iter(block.values())))
                start += count
                bar.update(count)

    def _rows(self, names: Sequence[str], start: int) -> Iterator[dict[str, NDArray[Any]]]:
        for number, first, count in self.order.runs(start):
            yield from self.tables[number].read(names, first, count, BLOCK_BYTES)

    def _cameras(self, names: Sequence[str]) -> dict[str, Camera]:
        """What is to be decoded, after a look at every file."""
        if not names:
            return {}
        fps = self.info.get("fps")
        if not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
            raise DataError(f"{self.where}: meta/info.json gives fps = {fps}; videos need a rate.")
        folder = Path(self.where)
        if self.hub_id is not None:
            patterns = [f"videos/{pattern}" for name in names for pattern in (f"{name}/*", f"*/{name}/*")]
            download_dataset(self.hub_id, [*patterns, "meta/*"])
        places = VideoPlaces(folder, self.info)
        has_times = _TIME in self.features and not self.features[_TIME].problem
        times = self.order.numbers(_TIME) if has_times else self.order.numbers(FRAME) / fps
        ends = np.cumsum(self.order.lengths)
        cameras = {
            name: Camera(
                name, places.of(name, self.order.episodes), times, ends, self.features[name].shape or (),
                tolerance=0.5 / fps,
            )
            for name in names
        }  # fmt: skip
        for camera in cameras.values():
            camera.check()
        return cameras

    def _declared(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """The rows in the shape that is declared: stored flat, or as one number where it is [1]."""
        shape = self.features[name].shape
        if shape is not None and self.features[name].kind == Kind.IMAGE and values.dtype == object:
            return decode_images(values, shape, f"{self.where}: '{name}'")
        if shape is None or values.shape[1:] == shape:
            return values
        if np.prod(values.shape[1:], dtype=np.int64) != np.prod(shape, dtype=np.int64):
            raise DataError(
                f"{self.where}: column '{name}' has rows of shape {values.shape[1:]} and meta/info.json "
                f"declares {shape}; fix the one that is wrong."
            )
        return values.reshape(len(values), *shape)


def _cut(blocks: Iterator[dict[str, NDArray[Any]]], rows: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The same rows in blocks of ``rows``, the last one perhaps shorter."""
    rest: dict[str, NDArray[Any]] = {}
    for block in blocks:
        joined = {name: np.concatenate([rest[name], new]) if rest else new for name, new in block.items()}
        count = len(next(iter(joined.values())))
        whole = count - count % rows
        for first in range(0, whole, rows):
            yield {name: values[first : first + rows] for name, values in joined.items()}
        rest = {name: values[whole:] for name, values in joined.items()} if whole < count else {}
    if rest:
        yield rest

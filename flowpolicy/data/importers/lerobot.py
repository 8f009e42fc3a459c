"""LeRobot datasets: ``meta/info.json`` and ``data/**/*.parquet``, layouts 2.0, 2.1 and 3.0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers import parquet
from flowpolicy.data.importers.registry import importer
from flowpolicy.data.importers.source import BLOCK_BYTES, Block, Feature, Source, json_object
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind
from flowpolicy.files.hub import download_dataset
from flowpolicy.optional import optional

_EPISODE, _FRAME, _TIME = "episode_index", "frame_index", "timestamp"
_BOOKKEEPING = {_EPISODE, _FRAME, _TIME, "index", "task_index"}
_KEYS = {"observation.state": "observation", "next.reward": "reward", "next.done": "done"}


@importer("lerobot", lambda contents: contents.has("meta/info.json"))
def open_lerobot(path: Path) -> Iterator[Source]:
    """A LeRobot dataset: its folder, or the repository id of one on the Hugging Face Hub.

    ``observation.state`` becomes ``observation``, ``observation.<key>`` becomes ``<key>``, ``next.reward``
    becomes ``reward``. Kinds and shapes are those that ``meta/info.json`` declares. Videos and encoded images
    are not decoded and are left out, with a warning. Times are compared with the declared rate.

    Args:
        path: folder, or repository id such as ``lerobot/pusht``.

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
    declared = info.get("features", {})
    if not isinstance(declared, dict):
        raise DataError(f"{description} must hold a JSON object with 'features'; copy the dataset again.")
    files = sorted(file for file in (folder / "data").rglob("*.parquet") if file.is_file())
    if not files:
        raise DataError(f"{folder} has no data/**/*.parquet; copy the dataset again.")
    tables = [parquet.Table(file) for file in files]
    features = _features(tables, declared)
    for key in (_EPISODE, _FRAME):
        if key not in features:
            has = ", ".join(f"'{name}'" for name in features)
            raise DataError(
                f"{folder}/data has no column '{key}' (it has {has}); layouts 2 and 3 can be read."
            )
    attributes = {"imported_from": str(path), "lerobot_version": str(info.get("codebase_version", "unknown"))}
    for name in ("fps", "robot_type"):
        if info.get(name) is not None:
            attributes[name] = info[name]
    order = _Order(tables, info, str(folder))
    times = features.get(_TIME)
    yield _Dataset(
        str(folder), features, order.names, attributes, action="action",
        timestamps=_TIME if times is not None and not times.problem else None,
        tables=tables, order=order,
    )  # fmt: skip


def _find_folder(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{path} is a file; give the LeRobot dataset's folder, the one with meta/info.json.")
    if path.is_absolute() or str(path).count("/") != 1:
        raise DataError(f"There is no LeRobot dataset at {path}; check the path.")
    return download_dataset(str(path), ["meta/info.json", "data/*"])


def _features(tables: Sequence[parquet.Table], declared: dict[str, Any]) -> dict[str, Feature]:
    """The columns of all files and the videos beside them, by what is declared and how they are stored."""
    types: dict[str, Any] = {}
    for table in tables:
        types = {**table.types, **types}
    features = {}
    for name in (*types, *(other for other in declared if other not in types)):
        spec = declared[name] if isinstance(declared.get(name), dict) else {}
        key = _KEYS.get(name, name.removeprefix("observation."))
        default = name not in _BOOKKEEPING
        if spec.get("dtype") in ("video", "image"):
            features[name] = Feature(name, key, Kind.ENCODED, default=default)
        elif name in types:
            features[name] = _feature(name, key, types[name], spec, default)
    return features


def _feature(name: str, key: str, stored: Any, spec: dict[str, Any], default: bool) -> Feature:
    kind, dtype = parquet.kind_of_type(stored)
    shape = spec.get("shape")
    is_shape = isinstance(shape, (list, tuple)) and all(type(n) is int and n > 0 for n in shape)
    if dtype is None or not is_shape:  # an undeclared shape: the rows themselves say it when they are read
        return Feature(name, key, kind, default=default)
    feature = Feature.of_array(name, key, dtype, tuple(shape or ()), default)
    axes = spec.get("names")
    if feature.kind == Kind.IMAGE and isinstance(axes, (list, tuple)) and len(axes) == 3:
        return replace(feature, channels_first=str(axes[0]).startswith("channel"))
    return feature


class _Order:
    """Where each step of each episode lies: rows of the files, in the order of episodes and frames."""

    def __init__(self, tables: Sequence[parquet.Table], info: dict[str, Any], where: str) -> None:
        columns = [table.integers([_EPISODE, _FRAME]) for table in tables]
        episode = np.concatenate([column[_EPISODE] for column in columns])
        frame = np.concatenate([column[_FRAME] for column in columns])
        if len(episode) == 0:
            raise DataError(f"{where} holds no step; record at least one episode.")
        order = np.lexsort((frame, episode))
        episode, frame = episode[order], frame[order]
        starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
        _check_whole(episode, frame, starts, info, where)
        self.names = [f"episode {int(number)}" for number in episode[starts]]
        self.lengths: NDArray[np.int64] = np.diff(np.append(starts, len(order)))
        firsts = np.cumsum([0, *(len(column[_EPISODE]) for column in columns)])
        self._order, self._firsts = order, firsts

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """File, first row in it, and rows, of each stretch that lies in a file as it is to be read."""
        file = np.searchsorted(self._firsts, self._order, side="right") - 1
        breaks = (np.diff(self._order) != 1) | (np.diff(file) != 0)
        starts = np.flatnonzero(np.concatenate([[True], breaks]))
        counts = np.diff(np.append(starts, len(self._order)))
        for start, count in zip(starts, counts, strict=True):
            number = int(file[start])
            yield number, int(self._order[start] - self._firsts[number]), int(count)


@dataclass
class _Dataset(Source):
    tables: list[parquet.Table] = field(kw_only=True)
    order: _Order = field(kw_only=True)

    def lengths(self, action: str) -> NDArray[np.int64]:
        return self.order.lengths

    def read(self, names: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[Block]:
        start = 0
        for number, first, count in self.order.runs():
            for rows in self.tables[number].read(names, first, count, BLOCK_BYTES):
                block = {name: self._declared(name, values) for name, values in rows.items()}
                yield Block(start, block)
                start += len(next(iter(block.values())))

    def _declared(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """The rows in the shape that is declared: stored flat, or as one number where it is [1]."""
        shape = self.features[name].shape
        if shape is None or values.shape[1:] == shape:
            return values
        if np.prod(values.shape[1:], dtype=np.int64) != np.prod(shape, dtype=np.int64):
            raise DataError(
                f"{self.where}: column '{name}' has rows of shape {values.shape[1:]} and meta/info.json "
                f"declares {shape}; fix the one that is wrong."
            )
        return values.reshape(len(values), *shape)


def _check_whole(
    episode: NDArray[Any], frame: NDArray[Any], starts: NDArray[Any], info: dict[str, Any], where: str
) -> None:
    expected = np.arange(len(frame)) - np.repeat(starts, np.diff(np.append(starts, len(frame))))
    wrong = frame != expected
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{where}: episode {episode[row]} has frame {frame[row]} where {expected[row]} is expected; "
            "steps are missing or doubled, so copy the dataset again."
        )
    counts = {"total_frames": len(frame), "total_episodes": len(starts)}
    for key, found in counts.items():
        if isinstance(info.get(key), int) and info[key] != found:
            raise DataError(
                f"{where}: meta/info.json gives {key} = {info[key]} and the data hold {found}; copy it again."
            )

"""LeRobot datasets: ``meta/info.json`` and ``data/**/*.parquet``, layouts 2.0, 2.1 and 3.0."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.episodes import join_episodes
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.zarr_reading import first_line, resolve_path
from flowpolicy.errors import DataError
from flowpolicy.hub import download_dataset
from flowpolicy.progress import progress

logger = logging.getLogger(__name__)
_INDEX_COLUMNS = ("episode_index", "frame_index")
_SKIPPED = {*_INDEX_COLUMNS, "timestamp", "index", "task_index"}
_RENAMED = {"observation.state": "observation", "next.reward": "reward", "next.done": "done"}


def read_lerobot(path: Path | str) -> Demonstrations:
    """Read a LeRobot dataset: its folder, or the repository id of one on the Hugging Face Hub.

    ``observation.state`` becomes ``observation``, ``observation.<key>`` becomes ``<key>``, ``next.reward``
    becomes ``reward``. Videos and encoded images are not decoded and are left out, with a warning.

    Args:
        path: folder, or repository id such as ``lerobot/pusht``.

    Raises:
        DataError: a damaged or incomplete dataset, or one without actions or state.
    """
    if importlib.util.find_spec("pyarrow") is None:  # known before anything is fetched
        raise DataError(
            f"{path} needs pyarrow to be read; install it with: pip install 'flowpolicy[import]'."
        )
    folder = _find_folder(path)
    info = _info(folder / "meta" / "info.json")
    columns = _columns(folder, info)
    where = str(folder)
    for key in (*_INDEX_COLUMNS, "action"):
        if key not in columns:
            has = ", ".join(f"'{name}'" for name in columns)
            raise DataError(
                f"{where}/data has no column '{key}' (it has {has}); layouts 2 and 3 can be read."
            )
    episode, frame = (_index(columns.pop(key), key, where) for key in _INDEX_COLUMNS)
    order = np.lexsort((frame, episode))
    episode, frame = episode[order], frame[order]
    _check_whole(episode, frame, info, where)
    arrays = {
        _RENAMED.get(key, key.removeprefix("observation.")): values[order] for key, values in columns.items()
    }
    cuts = np.flatnonzero(np.diff(episode)) + 1
    parts = {key: np.split(values, cuts) for key, values in arrays.items()}
    names = [f"episode {int(rows[0])}" for rows in np.split(episode, cuts)]
    episodes = [{key: part[i] for key, part in parts.items()} for i in range(len(names))]
    attributes = {"imported_from": str(path), "lerobot_version": str(info.get("codebase_version", "unknown"))}
    for name in ("fps", "robot_type"):
        if info.get(name) is not None:
            attributes[name] = info[name]
    return join_episodes(episodes, names, where, attributes)


def _find_folder(path: Path | str) -> Path:
    folder = resolve_path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(
            f"{folder} is a file; give the LeRobot dataset's folder, the one with meta/info.json."
        )
    if Path(path).is_absolute() or str(path).count("/") != 1:
        raise DataError(f"There is no LeRobot dataset at {path}; check the path.")
    return download_dataset(str(path), ["meta/info.json", "data/*"])


def _info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"There is no {path}; give the LeRobot dataset's folder, the one with meta/info.json."
        )
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({first_line(error)}); copy the dataset again.") from error
    if not isinstance(info, dict) or not isinstance(info.get("features", {}), dict):
        raise DataError(f"{path} must hold a JSON object with 'features'; copy the dataset again.")
    return info


def _columns(folder: Path, info: dict[str, Any]) -> dict[str, NDArray[Any]]:
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder} has no data/**/*.parquet; copy the dataset again.")
    tables = [_table(file) for file in progress(files, "read parquet files")]
    for file, table in zip(files, tables, strict=True):
        if table.keys() != tables[0].keys():
            raise DataError(f"{file} has other columns than {files[0].name}; make the files alike.")
    columns: dict[str, NDArray[Any]] = {}
    for key in tables[0]:
        parts = [table[key] for table in tables]
        if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            raise DataError(
                f"{folder}/data: column '{key}' has rows of several shapes; make the files alike."
            )
        columns[key] = np.concatenate(parts)
    videos = [
        name
        for name, spec in info.get("features", {}).items()
        if isinstance(spec, dict) and spec.get("dtype") == "video"
    ]
    if videos:
        logger.warning("%s: videos are not decoded; left out: %s.", folder, ", ".join(videos))
    return columns


def _table(path: Path) -> dict[str, NDArray[Any]]:
    """The numeric columns of one parquet file, ``(rows, ...)`` each."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, memory_map=False)
        columns = {}
        for key in table.column_names:
            if key in _SKIPPED and key not in _INDEX_COLUMNS:
                continue
            kind = table.schema.field(key).type
            if (
                pyarrow.types.is_struct(kind)
                or pyarrow.types.is_string(kind)
                or pyarrow.types.is_binary(kind)
            ):
                logger.warning("%s: column '%s' holds %s and is left out.", path.name, key, kind)
                continue
            columns[key] = _stacked(table.column(key), key, path)
        return columns
    except DataError:
        raise
    except Exception as error:  # pyarrow raises its own family and OSError
        raise DataError(
            f"{path} is cut off, damaged or no parquet file ({first_line(error)}); copy it again."
        ) from error


def _stacked(column: Any, key: str, path: Path) -> NDArray[Any]:
    if column.null_count:
        raise DataError(
            f"{path}: column '{key}' has {column.null_count} missing values; repair or remove those rows."
        )
    array = column.to_numpy(zero_copy_only=False)
    if array.dtype == object:  # lists: one array per row
        shapes = {np.shape(row) for row in array}
        if len(shapes) > 1:
            raise DataError(f"{path}: column '{key}' has rows of different lengths; make them alike.")
        array = np.stack([np.asarray(row.tolist() if row.dtype == object else row) for row in array])
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: column '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
    return np.asarray(array)


def _index(values: NDArray[Any], key: str, where: str) -> NDArray[Any]:
    values = values.reshape(len(values), -1)[:, 0]
    if values.dtype.kind not in "iu":
        raise DataError(f"{where}: column '{key}' holds {values.dtype}; it must hold integers.")
    return values.astype(np.int64)


def _check_whole(episode: NDArray[Any], frame: NDArray[Any], info: dict[str, Any], where: str) -> None:
    if len(episode) == 0:
        raise DataError(f"{where} holds no step; record at least one episode.")
    starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
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

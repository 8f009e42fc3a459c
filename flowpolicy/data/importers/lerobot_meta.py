"""What a LeRobot dataset says of itself beside its tables: tasks, names, statistics, shapes of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowpolicy.data.importers import parquet
from flowpolicy.data.importers.source import BLOCK_BYTES, json_object
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind

_MOST_TASKS = 1 << 20


def read_tasks(folder: Path) -> list[str] | None:
    """The tasks in words, by their number; None where the dataset names none.

    Raises:
        DataError: a damaged list, or numbers without a task.
    """
    table, lines = folder / "meta" / "tasks.parquet", folder / "meta" / "tasks.jsonl"
    if table.is_file():
        found, path = _tasks_of_table(table), table
    elif lines.is_file():
        found, path = _tasks_of_lines(lines), lines
    else:
        return None
    if not found:
        return None
    if min(found) < 0 or max(found) >= _MOST_TASKS:
        raise DataError(f"{path} numbers its tasks from {min(found)} to {max(found)}; copy it again.")
    return [found.get(number, "") for number in range(max(found) + 1)]


def _tasks_of_table(path: Path) -> dict[int, str]:
    table = parquet.Table(path)
    texts = [name for name, stored in table.types.items() if parquet.kind_of_type(stored)[0] is Kind.TEXT]
    if len(texts) != 1 or "task_index" not in table.types:
        raise DataError(f"{path} must have the columns 'task_index' and 'task'; copy the dataset again.")
    found: dict[int, str] = {}
    for rows in table.read(["task_index", *texts], 0, _MOST_TASKS, BLOCK_BYTES):
        found.update(zip(map(int, rows["task_index"]), map(str, rows[texts[0]]), strict=True))
    return found


def _tasks_of_lines(path: Path) -> dict[int, str]:
    if path.stat().st_size > BLOCK_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes, too many for a list of tasks; is it one?")
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return {int(row["task_index"]): str(row["task"]) for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(
            f"{path} must hold a JSON object with 'task_index' and 'task' on each line; copy it again."
        ) from error


def statistics(folder: Path) -> dict[str, Any] | None:
    """The dataset's own statistics, as they are; None where it has none of finite numbers."""
    path = folder / "meta" / "stats.json"
    if not path.is_file():
        return None
    try:
        found = json_object(path)
        json.dumps(found, allow_nan=False)
    except (DataError, ValueError):  # nothing here depends on them
        return None
    return found


def dimension_names(spec: dict[str, Any]) -> list[str] | None:
    """What a feature's dimensions are called: ``names`` is a list, or one below a word such as ``motors``."""
    names = spec.get("names")
    if isinstance(names, dict) and len(names) == 1:
        (names,) = names.values()
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


def image_shape(spec: dict[str, Any]) -> tuple[int, int, int] | None:
    """Height, width and channels of a declared image or video, which may be declared in another order."""
    shape, axes = spec.get("shape"), spec.get("names")
    if not isinstance(shape, (list, tuple)) or len(shape) != 3:
        return None
    if not all(type(n) is int and 0 < n < 1 << 14 for n in shape):
        return None
    named = isinstance(axes, (list, tuple)) and len(axes) == 3 and str(axes[0]).startswith("channel")
    if named or (shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)):
        channels, height, width = shape
    else:
        height, width, channels = shape
    return (height, width, channels) if channels in (1, 3, 4) else None

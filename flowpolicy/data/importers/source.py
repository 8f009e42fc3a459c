"""What a format's reader says of a file: the columns it declares, its episodes, blocks of chosen columns."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import reading_error
from flowpolicy.errors import DataError
from flowpolicy.features import FEATURE_KINDS
from flowpolicy.features.undeclared import Kind
from flowpolicy.runs.progress import progress

BLOCK_BYTES = 1 << 24
"""About as much as is held of a source at a time."""


@dataclass(frozen=True)
class Feature:
    """A column as its source declares it; nothing of its content has been read.

    Attributes:
        name: what the source calls it, in full: ``obs/agentview_image``, ``observation.state``.
        key: what it is called in a store unless it is renamed.
        kind: of its rows: a name in ``FEATURE_KINDS``, or what it is that no policy takes.
        shape: of one row; None where the source does not declare it.
        default: whether it is taken where no keys are chosen.
        note: why it cannot be read, in words that follow its name; empty where it can.
        channels_first: images are (channels, height, width).
        declared: the kind as a store or the user declares it, with its settings if any; None where it is told
            by how the column is stored.
    """

    name: str
    key: str
    kind: str = Kind.VECTOR
    shape: tuple[int, ...] | None = None
    default: bool = True
    note: str = ""
    channels_first: bool = False
    declared: Any = None

    @property
    def problem(self) -> str:
        """Why it cannot be taken, in words that follow its name; empty where it can."""
        return self.note or ("" if self.kind in FEATURE_KINDS else f"holds {self.kind}")


class Bounds(NamedTuple):
    """What an environment declares its actions to lie in, both ``(A,)`` or a number for all dimensions."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]


class Block(NamedTuple):
    """Rows of several columns: column ``name`` has ``arrays[name]`` at rows ``start, start + 1, ...``."""

    start: int
    arrays: dict[str, NDArray[Any]]


@dataclass
class Source(abc.ABC):
    """A file or folder whose declaration has been read.

    Attributes:
        where: what messages call it.
        features: its columns, by their full names.
        episodes: what messages call each episode.
        attributes: where the data come from.
        action: name of the column that is the action unless another is chosen.
        bounds: of that action; None where none are declared.
        clip: actions outside the bounds are clipped as the environment does, and not refused.
        timestamps: name of the column with each step's time in seconds; None where there is none.
    """

    where: str
    features: dict[str, Feature]
    episodes: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    action: str = "actions"
    bounds: Bounds | None = None
    clip: bool = False
    timestamps: str | None = None

    @abc.abstractmethod
    def lengths(self, action: Sequence[str]) -> NDArray[np.int64]:
        """Steps of each episode, ``(episodes,)``: the rows of the columns chosen as the action.

        Raises:
            DataError: episodes that cannot be told apart, or lack the action.
        """

    @abc.abstractmethod
    def read(self, names: Sequence[str], lengths: NDArray[np.int64]) -> Iterator[Block]:
        """The chosen columns in blocks, all episodes one after another, every row once and in order.

        Raises:
            DataError: a column that is missing somewhere, damaged, or has another number of rows.
        """


def read_parts(
    parts: Sequence[int] | NDArray[np.int64],
    names: Sequence[str],
    rows: Callable[[int, str], Any],
    where: Path | str,
) -> Iterator[Block]:
    """Blocks from columns that come in parts, such as one array per episode.

    Args:
        parts: rows of each part.
        names: of the columns.
        rows: ``rows(part, name)`` is an array, in memory or on disk, with at least that part's rows.
        where: the file, for messages.
    """
    start = 0
    for part in progress(range(len(parts)), "read demonstrations"):
        count = int(parts[part])
        arrays = {name: rows(part, name) for name in names}
        width = sum(row_bytes(array) for array in arrays.values())
        size = max(1, BLOCK_BYTES // max(1, width))
        for first in range(0, count, size):
            until = min(first + size, count)
            yield Block(start + first, {n: _slice(a, first, until, n, where) for n, a in arrays.items()})
        start += count


def row_bytes(array: Any) -> int:
    """Bytes of one row of an array in memory or on disk."""
    return int(np.prod(array.shape[1:], dtype=np.float64) * array.dtype.itemsize)


def _slice(array: Any, first: int, until: int, name: str, where: Path | str) -> NDArray[Any]:
    try:
        return np.asarray(array[first:until])
    except Exception as error:  # whatever the library below raises for damaged parts
        raise reading_error(error, where, f"cannot be read at '{name}'") from error


def json_object(path: Path, whole: str = "dataset") -> dict[str, Any]:
    """The JSON object in a small file beside the data.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > BLOCK_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes, too many for a description; is it one?")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise reading_error(error, path, "is not JSON", f"copy the {whole} again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object; copy the {whole} again.")
    return content

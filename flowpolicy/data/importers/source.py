"""The interface of an importer's file: its declared columns, its episodes, and rows of chosen columns."""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import reading_error
from flowpolicy.errors import DataError
from flowpolicy.features import FEATURE_KINDS
from flowpolicy.features.image import channels_first
from flowpolicy.features.undeclared import Kind, kind_of
from flowpolicy.runs.progress import progress_bar

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
        declared: the kind as a store or the user declares it, with its settings if any; None where it follows
            from how the column is stored.
    """

    name: str
    key: str
    kind: str = Kind.VECTOR
    shape: tuple[int, ...] | None = None
    default: bool = True
    note: str = ""
    channels_first: bool = False
    declared: Any = None

    @classmethod
    def of_array(
        cls, name: str, key: str, dtype: np.dtype[Any], shape: Sequence[int], default: bool = True
    ) -> Feature:
        """A column of plain arrays: its kind follows from its name and from the type and shape of a row."""
        kind = kind_of(name, dtype, shape)
        first = kind is Kind.IMAGE and len(shape) == 3 and channels_first(shape)
        return cls(name, key, kind, tuple(shape), default, channels_first=first)

    @property
    def problem(self) -> str:
        """Why it cannot be taken, in words that follow its name; empty where it can."""
        # Strings are observed as a store's tasks, whose numbers it keeps; as they are, no array has them.
        is_array = self.kind in FEATURE_KINDS and self.kind != Kind.TEXT
        return self.note or ("" if is_array else f"holds {self.kind}")

    @property
    def is_text(self) -> bool:
        """Whether its rows are strings that can be read, and be a store's tasks."""
        return self.kind == Kind.TEXT and not self.note


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
    """A file or folder whose declaration has been read; :class:`ArraySource` is what most are.

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
    episodes: Sequence[str] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    action: str = "actions"
    bounds: Bounds | None = None
    clip: bool = False
    timestamps: str | None = None

    @abc.abstractmethod
    def lengths(self, action: str) -> NDArray[np.int64]:
        """Steps of each episode, ``(episodes,)``: the rows of the column chosen as the action.

        Raises:
            DataError: episodes that cannot be separated, or lack the action.
        """

    @abc.abstractmethod
    def read(self, names: Sequence[str], lengths: NDArray[np.int64], after: int = 0) -> Iterator[Block]:
        """The chosen columns in blocks, all episodes one after another, every row once and in order.

        Args:
            names: of the columns.
            lengths: see :meth:`lengths`.
            after: so many episodes at the beginning are left out, and at least one is not.

        Raises:
            DataError: a column that is missing somewhere, damaged, or has another number of rows.
        """


@dataclass
class ArraySource(Source):
    """Columns that are arrays, in memory or on disk: one an episode, or one over all episodes.

    Attributes:
        rows: ``rows(episode, column)`` is an array with that episode's rows, of which only slices are read;
            with ``flat_lengths`` it has the rows of all episodes, one after another.
        longer: whether a column has one row more in each episode than there are actions; it is left out.
        flat_lengths: from the number of steps to the steps of each episode ``(episodes,)``, where a column is
            one array over all episodes; None where it is one an episode.
    """

    rows: Callable[[int, str], Any] = field(kw_only=True)
    longer: Callable[[str], bool] = field(kw_only=True, default=lambda name: False)
    flat_lengths: Callable[[int], NDArray[np.int64]] | None = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        if not self.episodes and self.flat_lengths is None:
            raise DataError(f"{self.where} holds no episode; record at least one.")

    def lengths(self, action: str) -> NDArray[np.int64]:
        """Steps of each episode, ``(episodes,)``."""
        if self.flat_lengths is not None:
            steps = int(self._rows(0, action).shape[0])
            if steps == 0:
                raise DataError(f"{self.where}: '{action}' holds no step; record at least one episode.")
            lengths = self.flat_lengths(steps)
            self.episodes = self.episodes or [f"episode {number}" for number in range(len(lengths))]
            return lengths
        extra = int(self.longer(action))
        counts = [self._rows(number, action).shape[0] - extra for number in range(len(self.episodes))]
        return np.array([max(0, count) for count in counts], np.int64)

    def read(self, names: Sequence[str], lengths: NDArray[np.int64], after: int = 0) -> Iterator[Block]:
        """The chosen columns in blocks of about :data:`BLOCK_BYTES`."""
        parts = lengths if self.flat_lengths is None else [lengths.sum()]
        start, done = 0, int(lengths[:after].sum())
        with progress_bar(int(lengths.sum()), "read demonstrations", done=done) as bar:
            for part in range(len(parts)):
                count = int(parts[part])
                if start + count <= done:
                    start += count
                    continue
                arrays = {name: self._checked_rows(part, name, count) for name in names}
                width = sum(_row_bytes(array) for array in arrays.values())
                size = max(1, BLOCK_BYTES // max(1, width))
                for first in range(max(0, done - start), count, size):
                    until = min(first + size, count)
                    rows = {name: self._slice(array, first, until, name) for name, array in arrays.items()}
                    yield Block(start + first, rows)
                    bar.update(until - first)
                start += count

    def _checked_rows(self, part: int, name: str, count: int) -> Any:
        array = self._rows(part, name)
        extra = int(self.longer(name))
        if array.shape[0] != count + extra:
            rule = "one row more than actions" if extra else "one row per step"
            inside = "" if self.flat_lengths is not None else f" in '{self.episodes[part]}'"
            raise DataError(
                f"{self.where}: '{name}' has {array.shape[0]} rows{inside} and the actions have {count}; "
                f"every such key needs {rule}."
            )
        return array

    def _rows(self, part: int, name: str) -> Any:
        try:
            array = self.rows(part, name)
        except Exception as error:  # whatever an importer's libraries raise
            raise reading_error(error, self.where, f"cannot be read at '{name}'") from error
        if not array.shape:
            raise DataError(f"{self.where}: '{name}' is a single number; it must have one row per step.")
        return array

    def _slice(self, array: Any, first: int, until: int, name: str) -> NDArray[Any]:
        try:
            return np.asarray(array[first:until])
        except Exception as error:  # whatever the library below raises for damaged parts
            raise reading_error(error, self.where, f"cannot be read at '{name}'") from error


def _row_bytes(array: Any) -> int:
    return int(np.prod(array.shape[1:], dtype=np.float64) * array.dtype.itemsize)


def natural_order(names: Sequence[str]) -> list[str]:
    """Names sorted by the numbers in them, so that ``demo_10`` comes after ``demo_2``."""
    return sorted(
        names,
        key=lambda name: [
            (1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)
        ],
    )


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

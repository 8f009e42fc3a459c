"""From a source to a store: list, choose, read only that, check, write; a block of rows at a time."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import first_line
from flowpolicy.data.importers.checks import BoundsCheck, Episodes, TimeCheck
from flowpolicy.data.importers.choosing import Choice, Column, choose_columns
from flowpolicy.data.importers.columns import ColumnReader, WideNumbersError, numeric
from flowpolicy.data.importers.source import Bounds, Source
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.store import Demonstrations, episode_ends_problem
from flowpolicy.data.versions import version_warning
from flowpolicy.data.zarr_reading import EPISODE_KEYS, NOT_OBSERVED
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features.stored import KINDS
from flowpolicy.features.undeclared import Kind
from flowpolicy.settings import require

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Checks:
    """What is asked of the values.

    Attributes:
        action_bounds: (low, high), numbers or one per dimension; None takes the source's, if any.
        out_of_bounds: ``refuse`` or ``clip``.
        allow_gaps: steps whose times show a gap are taken with a warning.
        continuous_quaternions: changes between q and -q inside an episode are undone.
    """

    action_bounds: Sequence[Any] | None = None
    out_of_bounds: str = "refuse"
    allow_gaps: bool = False
    continuous_quaternions: bool = False

    def __post_init__(self) -> None:
        require(
            self.out_of_bounds in ("refuse", "clip"),
            "out_of_bounds",
            self.out_of_bounds,
            "'refuse' or 'clip'",
        )
        if self.action_bounds is not None:
            _pair(self.action_bounds)


def import_whole(source: Source, choice: Choice, checks: Checks, take: Callable[[Import], T]) -> T:
    """What ``take`` makes of the import of the chosen columns.

    Whether float32 can hold a column is known when all of it was seen. In the rare case that it cannot,
    ``take`` is called again with that column as wide as it is.
    """
    wide: set[str] = set()
    while True:
        try:
            return take(Import(source, choice, checks, wide))
        except WideNumbersError as error:
            wide.update(error.keys)


class Import:
    """The chosen columns of a source, checked, as blocks of a store's keys.

    Args:
        source: opened.
        choice: of its columns.
        checks: of their values.
        wide: keys whose floats stay as wide as they are; the others become float32.

    Attributes:
        episode_ends: ``(episodes,)``.
        attributes: where the data come from; whole when all blocks have been read.
    """

    def __init__(self, source: Source, choice: Choice, checks: Checks, wide: Collection[str] = ()) -> None:
        self._source, self._checks, self._wide = source, checks, wide
        if not source.episodes:
            raise DataError(f"{source.where} holds no episode; record at least one.")
        columns = choose_columns(source, choice)
        action = next(column for column in columns if column.key == "action")
        lengths = source.lengths(action.names)
        if not len(lengths):
            raise DataError(f"{source.where} holds no episode; record at least one.")
        if (lengths == 0).any():
            name = source.episodes[int((lengths == 0).argmax())]
            raise DataError(f"{source.where}: '{name}' has no step; remove that episode.")
        self.episode_ends: NDArray[np.int64] = np.cumsum(lengths)
        problem = episode_ends_problem(self.episode_ends, int(lengths.sum()))
        if problem is not None:
            raise DataError(f"{source.where}: {problem}.")
        self._lengths, self._episodes = lengths, Episodes(source.episodes, lengths)
        self._columns = [column for column in columns if not column.optional or self._is_sound(column)]
        own = action.names == (source.action,) and not action.flatten
        self._bounds = self._bounds_check(source.bounds if own else None)
        self.attributes = {**source.attributes, KINDS: _kinds(self._columns)}
        if source.bounds is not None and own:
            self.attributes["action_bounds"] = [_plain(bound) for bound in source.bounds]
        warning = version_warning(self.attributes)
        if warning:
            logger.warning("%s: %s", source.where, warning)

    @property
    def num_steps(self) -> int:
        """Steps over all episodes."""
        return int(self.episode_ends[-1])

    def blocks(self) -> Iterator[dict[str, NDArray[Any]]]:
        """The next rows of every key, ``(rows, ...)``.

        Raises:
            DataError: whatever is wrong with the values, in one sentence.
            WideNumbersError: after all rows, columns that lost what they said by becoming float32.
        """
        readers = [self._reader(column) for column in self._columns]
        names = dict.fromkeys(name for column in self._columns for name in column.names)
        times, fps = self._source.timestamps, self.attributes.get("fps")
        clock = None
        if times is not None and isinstance(fps, (int, float)) and 0 < fps < float("inf"):
            clock = TimeCheck(float(fps), self._source.where, self._episodes, self._checks.allow_gaps)
            names[times] = None
        for block in self._source.read(list(names), self._lengths):
            if clock is not None and times is not None:
                clock.rows(block.arrays[times], block.start)
            rows = {reader.column.key: reader.rows(block) for reader in readers}
            if self._bounds is not None:
                rows["action"] = self._bounds.rows(rows["action"], block.start)
            yield rows
        collapsed = [reader.column.key for reader in readers if reader.collapses]
        if collapsed:
            raise WideNumbersError(collapsed)
        for reader in readers:
            reader.report()
        if self._bounds is not None:
            self._bounds.finish()
            if self._bounds.outside or self._source.clip:
                self.attributes["actions_clipped"] = self._bounds.outside

    def in_memory(self) -> Demonstrations:
        """Everything at once.

        Raises:
            DataError: besides what :meth:`blocks` raises, more than the memory that is free.
        """
        arrays: dict[str, NDArray[Any]] = {}
        filled = 0
        for rows in self.blocks():
            if not arrays:
                self._check_memory(rows)
                arrays = {
                    key: np.empty((self.num_steps, *values.shape[1:]), values.dtype)
                    for key, values in rows.items()
                }
            count = len(rows["action"])
            for key, values in rows.items():
                arrays[key][filled : filled + count] = values
            filled += count
        return Demonstrations(arrays, self.episode_ends, self.attributes, self._source.where)

    def _reader(self, column: Column) -> ColumnReader:
        continuous = self._checks.continuous_quaternions
        is_wide = column.key in self._wide
        return ColumnReader(
            column, self._source.where, self._episodes, continuous=continuous, is_wide=is_wide
        )

    def _is_sound(self, column: Column) -> bool:
        """Whether a column that nobody asked for can be read; it is small, so that this is no second pass."""
        try:
            reader = self._reader(column)
            for block in self._source.read(list(column.names), self._lengths):
                reader.rows(block)
        except DataError as error:
            logger.warning("'%s' is left out, as nobody asked for it and it is broken: %s", column.key, error)
            return False
        return True

    def _bounds_check(self, declared: Bounds | None) -> BoundsCheck | None:
        given = self._checks.action_bounds
        if given is not None:
            low, high = _pair(given)
            return BoundsCheck(Bounds(low, high), self._checks.out_of_bounds == "clip", self._source.where)
        if declared is None:
            return None
        clip = self._source.clip or self._checks.out_of_bounds == "clip"
        return BoundsCheck(declared, clip, self._source.where)

    def _check_memory(self, rows: Mapping[str, NDArray[Any]]) -> None:
        needed = sum(values[:1].nbytes for values in rows.values()) * self.num_steps
        free = free_memory_bytes()
        if needed > free:
            raise DataError(
                f"{self._source.where}: the chosen keys take {needed / 1e9:.1f} GB of memory and "
                f"{free / 1e9:.1f} GB are free; choose fewer with keys=[...], or import into a store, which "
                "needs little."
            )


def transformed(
    demos: Demonstrations, dotted: str, keys: Sequence[str] | None, checks: Checks
) -> Demonstrations:
    """Demonstrations whose arrays went through ``module:function``, a dict of arrays to a dict of arrays.

    Args:
        demos: the demonstrations.
        dotted: names the function.
        keys: what to keep of its result, as :class:`Choice` has it.
        checks: the user's bounds are applied to its result.

    Raises:
        ConfigError: a function that cannot be found.
        DataError: a function that fails on these data or does not return arrays, or a missing key.
    """
    arrays = _called(demos, dotted)
    arrays = {
        key: numeric(array, key, demos.source, is_wide=collapses_in_float32(array))
        for key, array in arrays.items()
    }
    if keys is not None:
        kept = dict.fromkeys([*keys, "action", *(key for key in EPISODE_KEYS if key in arrays)])
        for key in kept:
            if key not in arrays:
                has = ", ".join(f"'{name}'" for name in arrays)
                raise DataError(f"{demos.source} has no key '{key}'; it has {has}.")
        arrays = {key: arrays[key] for key in kept}
    result = Demonstrations(arrays, demos.episode_ends, demos.attributes, demos.source)
    if checks.action_bounds is not None:
        check = BoundsCheck(
            Bounds(*_pair(checks.action_bounds)), checks.out_of_bounds == "clip", demos.source
        )
        result.arrays["action"] = check.rows(result.arrays["action"], 0)
        check.finish()
        if check.outside:
            result.attributes["actions_clipped"] = check.outside
    return result


def _called(demos: Demonstrations, dotted: str) -> Mapping[str, NDArray[Any]]:
    module, _, name = dotted.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"demo_transform '{dotted}' cannot be found ({first_line(error)}); write it module:function."
        ) from error
    try:
        arrays = function(dict(demos.arrays))
    except KeyError as error:
        raise DataError(
            f"{demos.source} lacks {error}, which demo_transform '{dotted}' needs; is it for this data?"
        ) from error
    except Exception as error:  # whatever a user's function raises
        raise DataError(
            f"demo_transform '{dotted}' fails on {demos.source} ({first_line(error)})."
        ) from error
    if not isinstance(arrays, Mapping) or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise DataError(f"demo_transform '{dotted}' must return a dict of numpy arrays.")
    return arrays


def _kinds(columns: Sequence[Column]) -> dict[str, Any]:
    """What the columns are declared to be; of undeclared vectors a store tells that they are."""
    whole = {column.key: column.features[0] for column in columns if not column.flatten}
    return {
        key: feature.declared or str(feature.kind)
        for key, feature in whole.items()
        if key not in NOT_OBSERVED and (feature.declared or feature.kind != Kind.VECTOR)
    }


def _plain(bound: NDArray[np.float64]) -> Any:
    """A bound as JSON has it: None where there is none."""
    plain = [value if np.isfinite(value) else None for value in bound.reshape(-1).tolist()]
    return plain if bound.ndim else plain[0]


def _pair(bounds: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    allowed = "[low, high] with low < high, numbers or one for each action dimension"
    try:
        low, high = (np.asarray(bound, np.float64) for bound in bounds)
    except (TypeError, ValueError):
        require(False, "action_bounds", bounds, allowed)
        raise
    is_pair = low.ndim < 2 and low.shape == high.shape and bool((low < high).all())
    require(is_pair, "action_bounds", list(bounds), allowed)
    return low, high

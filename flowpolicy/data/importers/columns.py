"""From blocks of a source's columns to blocks of the store's keys, each row checked on its way."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.features import Kind, is_quaternion
from flowpolicy.data.importers.choosing import Column
from flowpolicy.data.importers.source import Block, Bounds, Feature
from flowpolicy.data.rounding import RoundingCheck
from flowpolicy.data.zarr_reading import EPISODE_KEYS
from flowpolicy.errors import DataError
from flowpolicy.observations import is_image

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-5
_GAP = 1.5  # periods between two steps beyond which something was lost between them
_PER_STEP = (*EPISODE_KEYS, "done")


class Episodes:
    """Where each episode begins and ends, and what messages call it."""

    def __init__(self, names: Sequence[str], lengths: NDArray[np.int64]) -> None:
        self.names, self.ends = names, np.cumsum(lengths)
        self.starts = self.ends - lengths

    def name(self, step: int) -> str:
        """Of the episode with this step."""
        return self.names[int(np.searchsorted(self.ends, step, side="right"))]

    def begins(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of ``count`` steps from ``start`` on are an episode's first, ``(count,)``."""
        first, last = np.searchsorted(self.starts, [start, start + count])
        flags = np.zeros(count, bool)
        flags[self.starts[first:last] - start] = True
        return flags


class WideNumbersError(Exception):
    """Columns that were read as float32 hold numbers that it cannot tell apart.

    Args:
        keys: of the columns.
    """

    def __init__(self, keys: Collection[str]) -> None:
        super().__init__(", ".join(keys))
        self.keys = keys


class ColumnReader:
    """One key of the store, block by block; where ``is_wide``, wide floats do not become float32."""

    def __init__(
        self, column: Column, where: str, episodes: Episodes, *, continuous: bool, is_wide: bool
    ) -> None:
        self.column, self._where, self._episodes, self._is_wide = column, where, episodes, is_wide
        self._rounding: dict[str, RoundingCheck] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._quaternions = {
            feature.name: Quaternions(feature.name, where, episodes, continuous)
            for feature in column.features
            if feature.shape is not None and is_quaternion(feature.name, feature.shape)
        }

    def rows(self, block: Block) -> NDArray[Any]:
        """The block's rows of this key, ``(rows, ...)``, in the store's types.

        Raises:
            DataError: rows of several shapes, no numbers, not finite, beyond float32, or impossible images.
        """
        parts = [self._part(feature, block) for feature in self.column.features]
        if self.column.flatten:
            dtype = np.float64 if self._is_wide else np.float32
            parts = [part.reshape(len(part), -1).astype(dtype) for part in parts]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return self._shaped(rows)

    @property
    def collapses(self) -> bool:
        """Whether the rows so far were wide floats, became float32, and float32 cannot tell them apart."""
        return not self._is_wide and any(check.collapses for check in self._rounding.values())

    def report(self) -> None:
        """Say what was found on the way."""
        for quaternions in self._quaternions.values():
            quaternions.report()

    def _part(self, feature: Feature, block: Block) -> NDArray[Any]:
        values = block.arrays[feature.name]
        self._check_shape(feature.name, values.shape[1:], block.start)
        if feature.kind is Kind.IMAGE:
            return _pixels(values, feature, self._where)
        self._rounding.setdefault(feature.name, RoundingCheck()).rows(values)
        values = numeric(values, self.column.key, self._where, is_wide=self._is_wide)
        if values.dtype.kind == "f":
            self._check_finite(feature.name, values, block.start)
        if feature.name in self._quaternions:
            values = self._quaternions[feature.name].follow(values, block.start)
        return values

    def _check_shape(self, name: str, shape: tuple[int, ...], start: int) -> None:
        first = self._shapes.setdefault(name, shape)
        if shape != first:
            raise DataError(
                f"{self._where}: '{name}' has rows of shape {shape} in '{self._episodes.name(start)}' and "
                f"{first} in '{self._episodes.names[0]}'; make the episodes alike."
            )

    def _check_finite(self, name: str, values: NDArray[Any], start: int) -> None:
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            step = start + int(bad.argmax())
            raise DataError(
                f"{self._where}: '{name}' is not finite at step {step} ('{self._episodes.name(step)}'); "
                "remove or repair that episode, or leave the key out with keys=[...]."
            )

    def _shaped(self, rows: NDArray[Any]) -> NDArray[Any]:
        key, shape = self.column.key, rows.shape[1:]
        if 0 in shape:
            raise DataError(f"{self._where}: '{key}' has empty rows of shape {shape}; leave it out.")
        if key == "action" and len(shape) != 1:
            raise DataError(
                f"{self._where}: 'action' has rows of shape {shape}; it must be (steps, action dimension), "
                f"and action=[{self.column.names[0]}] takes it as one vector."
            )
        if key in _PER_STEP:
            if rows.size != len(rows):
                raise DataError(f"{self._where}: '{key}' has rows of shape {shape}; it is one number a step.")
            return rows.reshape(len(rows))
        is_vector = self.column.features[0].kind is Kind.VECTOR
        if not shape or (is_vector and is_image(shape)):  # a pose is no picture, whatever its shape
            return rows.reshape(len(rows), -1)
        return rows


def numeric(array: NDArray[Any], key: str, source: str, *, is_wide: bool = False) -> NDArray[Any]:
    """``array`` in the store's types: integer actions as float32, wide floats too unless ``is_wide``.

    Raises:
        DataError: what is not a number, or a value float32 cannot hold.
    """
    if array.dtype.kind not in "fiub":
        raise DataError(f"{source}: '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
    wide = array.dtype.kind == "f" and array.dtype != np.float32
    if not wide and not (key == "action" and array.dtype.kind in "iub"):
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if wide and (np.isinf(narrow) & np.isfinite(array)).any():
        raise DataError(
            f"{source}: '{key}' reaches {np.abs(array).max():.3g}, beyond float32; rescale or repair it."
        )
    return array if wide and is_wide else narrow


def _pixels(values: NDArray[Any], feature: Feature, where: str) -> NDArray[np.uint8]:
    """Images as uint8, channels last."""
    if values.ndim == 3:  # of one channel, without an axis for it
        values = values[..., None]
    elif feature.channels_first:
        values = np.moveaxis(values, 1, -1)
    if not is_image(values.shape[1:]):
        raise DataError(
            f"{where}: '{feature.name}' has images of shape {values.shape[1:]}; they must have 1, 3 or 4 "
            "channels, last or first."
        )
    if values.dtype != np.uint8:
        whole = (values >= 0) & (values <= 255) & (values == np.round(values))
        if not whole.all():
            raise DataError(
                f"{where}: '{feature.name}' holds images of {values.dtype} that are no whole numbers from 0 "
                f"to 255; store them as uint8, or take them as numbers with "
                f"kinds={{'{feature.name}': vector}}."
            )
    return np.ascontiguousarray(values, np.uint8)


class Quaternions:
    """Watches for an orientation whose sign jumps: q and -q are one rotation and far apart as numbers.

    A sensor that jumps in the recording jumps on the robot too, so that they are left as they are, with a
    word, unless the user asks for continuity: the sign is then the one nearer to the step before.
    """

    def __init__(self, name: str, where: str, episodes: Episodes, continuous: bool) -> None:
        self.jumps = 0
        self._name, self._where, self._episodes, self._continuous = name, where, episodes, continuous
        self._last: NDArray[Any] | None = None
        self._sign = 1.0

    def follow(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        """The rows ``(rows, ..., 4)``, with the signs that were asked for."""
        if not len(values):
            return values
        before = np.concatenate([values[:1] if self._last is None else self._last[None], values[:-1]])
        begins = self._episodes.begins(start, len(values)).reshape(-1, *[1] * (values.ndim - 2))
        flips = ((values * before).sum(axis=-1) < 0) & ~begins
        self.jumps += int(flips.sum())
        self._last = values[-1].copy()
        if not self._continuous:
            return values
        signs = np.ones(flips.shape, values.dtype)
        sign: Any = self._sign
        for row, (flip, first) in enumerate(zip(flips, begins, strict=True)):
            sign = np.where(first, 1.0, np.where(flip, -1.0, 1.0) * sign)
            signs[row] = sign
        self._sign = sign
        return np.asarray(values * signs[..., None])

    def report(self) -> None:
        """Say what was found."""
        if self.jumps and self._continuous:
            logger.info("%s: '%s': %d changes of sign are undone.", self._where, self._name, self.jumps)
        elif self.jumps:
            logger.warning(
                "%s: '%s' changes between q and -q, the same rotation, %d times inside episodes; "
                "continuous_quaternions=true undoes it, where the robot's own are continuous too.",
                self._where, self._name, self.jumps,
            )  # fmt: skip


class BoundsCheck:
    """Counts the actions outside their bounds, and clips them where that is asked."""

    def __init__(self, bounds: Bounds, clip: bool, where: str) -> None:
        self._low, self._high = np.asarray(bounds.low), np.asarray(bounds.high)
        self._clip, self._where = clip, where
        span = np.where(np.isfinite(self._high - self._low), self._high - self._low, 0.0)
        self._slack = _TOLERANCE * np.maximum(1.0, span)
        self._steps, self._first, self.outside, self._entries = 0, 0, 0, 0
        self._dimension = 0

    def rows(self, action: NDArray[Any], start: int) -> NDArray[Any]:
        """The actions ``(rows, A)`` within the bounds."""
        if self._low.size not in (1, action.shape[1]):
            logger.warning(
                "%s: there are bounds for %d action dimensions and the actions have %d; the widest are used.",
                self._where, self._low.size, action.shape[1],
            )  # fmt: skip
            self._low, self._high, self._slack = self._low.min(), self._high.max(), self._slack.max()
        beyond = (action < self._low - self._slack) | (action > self._high + self._slack)
        steps = beyond.any(axis=1)
        if steps.any() and not self._steps:
            self._first = start + int(steps.argmax())
            self._dimension = int(beyond[int(steps.argmax())].argmax())
        self._steps += int(steps.sum())
        self.outside += int(beyond.sum())
        self._entries += beyond.size
        return np.asarray(np.clip(action, self._low, self._high), action.dtype)

    def finish(self) -> None:
        """Say what was clipped.

        Raises:
            DataError: actions that lie outside and are not to be clipped.
        """
        low, high = (
            float(
                np.broadcast_to(bound.reshape(-1), (max(bound.size, self._dimension + 1),))[self._dimension]
            )
            for bound in (self._low, self._high)
        )
        of = (
            f" in dimension {self._dimension}"
            if self._low.size > 1 and np.ptp(self._low) + np.ptp(self._high)
            else ""
        )
        if self._steps and not self._clip:
            raise DataError(
                f"{self._where}: 'action' leaves its bounds [{low:g}, {high:g}]{of} in {self._steps} steps "
                f"(first at step {self._first}); set out_of_bounds=clip, or give other action_bounds."
            )
        if self._steps:
            logger.info(
                "%s: %d of %d action entries (%.1f%%) lie outside [%g, %g]%s and are clipped.",
                self._where, self.outside, self._entries, 100 * self.outside / self._entries, low, high, of,
            )  # fmt: skip


class TimeCheck:
    """Compares the steps' times with the declared rate: a gap inside an episode is lost data."""

    def __init__(self, fps: float, where: str, episodes: Episodes, allow_gaps: bool) -> None:
        self._period, self._where, self._episodes, self._allow = 1 / fps, where, episodes, allow_gaps
        self._last: float | None = None

    def rows(self, times: NDArray[Any], start: int) -> None:
        """Check the times of a block's steps, seconds, ``(rows,)`` or ``(rows, 1)``.

        Raises:
            DataError: a step that comes late by more than half a period, or not after the one before.
        """
        times = np.asarray(times, np.float64).reshape(len(times), -1)[:, 0]
        before = np.concatenate([times[:1] if self._last is None else [self._last], times[:-1]])
        waits = np.where(self._episodes.begins(start, len(times)), self._period, times - before)
        self._last = float(times[-1]) if len(times) else self._last
        bad = ~((waits > 0) & (waits <= _GAP * self._period))
        if not bad.any():
            return
        row = int(bad.argmax())
        sentence = (
            f"{self._where}: '{self._episodes.name(start + row)}' has a step {waits[row]:.3g} s after the "
            f"one before, at {times[row]:.3f} s, where its rate says {self._period:.3g} s"
        )
        if not self._allow:
            raise DataError(f"{sentence}; mend or remove that episode, or accept it with allow_gaps=true.")
        logger.warning("%s; taken as it is.", sentence)
        self._allow_quietly()

    def _allow_quietly(self) -> None:
        self.rows = lambda times, start: None  # type: ignore[method-assign]

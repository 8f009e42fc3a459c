"""Checks over all rows of an import, in order: bounds of actions, times, rotations.

Each check takes rows as they come, gives them back as they are to be kept, and speaks at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.source import Bounds
from flowpolicy.errors import DataError

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-5
_GAP = 1.5  # periods between two steps beyond which something was lost between them


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


class Quaternions:
    """Watches for an orientation whose sign jumps: q and -q are one rotation and far apart as numbers.

    A sensor that jumps in the recording jumps on the robot too, so that they are left as they are, with a
    word, unless the user asks for continuity: the sign is then the one nearer to the step before.
    """

    def __init__(self, name: str, where: str, episodes: Episodes, continuous: bool) -> None:
        self._name, self._where, self._episodes, self._continuous = name, where, episodes, continuous
        self._last: NDArray[Any] | None = None
        self._sign: Any = 1.0
        self._jumps = 0

    def rows(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        """The rows ``(rows, ..., 4)``, with the signs that were asked for."""
        if not len(values):
            return values
        before = np.concatenate([values[:1] if self._last is None else self._last[None], values[:-1]])
        begins = self._episodes.begins(start, len(values)).reshape(-1, *[1] * (values.ndim - 2))
        flips = ((values * before).sum(axis=-1) < 0) & ~begins
        self._jumps += int(flips.sum())
        self._last = values[-1].copy()
        if not self._continuous:
            return values
        signs = np.ones(flips.shape, values.dtype)
        for row, (flip, first) in enumerate(zip(flips, begins, strict=True)):
            self._sign = signs[row] = np.where(first, 1.0, np.where(flip, -1.0, 1.0) * self._sign)
        return np.asarray(values * signs[..., None])

    def finish(self) -> None:
        """Say what was found."""
        if self._jumps and self._continuous:
            logger.info("%s: '%s': %d changes of sign are undone.", self._where, self._name, self._jumps)
        elif self._jumps:
            logger.warning(
                "%s: '%s' changes between q and -q, the same rotation, %d times inside episodes; "
                "continuous_quaternions=true undoes it, where the robot's own are continuous too.",
                self._where, self._name, self._jumps,
            )  # fmt: skip


class BoundsCheck:
    """Counts the actions outside their bounds, and clips them where that is asked."""

    def __init__(self, bounds: Bounds, clip: bool, where: str) -> None:
        self._bounds, self._clip, self._where = bounds, clip, where
        self.outside, self._entries, self._steps = 0, 0, 0
        self._first: tuple[int, str] = (0, "")

    def rows(self, action: NDArray[Any], start: int) -> NDArray[Any]:
        """The actions ``(rows, A)`` within the bounds."""
        low, high = self._bounds
        if low.size not in (1, action.shape[1]):
            logger.warning(
                "%s: there are bounds for %d action dimensions and the actions have %d; the widest are used.",
                self._where, low.size, action.shape[1],
            )  # fmt: skip
            low, high = self._bounds = Bounds(low.min(), high.max())
        with np.errstate(invalid="ignore"):
            span = np.where(np.isfinite(high - low), high - low, 0.0)
        slack = _TOLERANCE * np.maximum(1.0, span)
        beyond = (action < low - slack) | (action > high + slack)
        steps = beyond.any(axis=1)
        if steps.any() and not self._steps:
            row = int(steps.argmax())
            self._first = start + row, self._described(int(beyond[row].argmax()))
        self._steps += int(steps.sum())
        self.outside += int(beyond.sum())
        self._entries += beyond.size
        return np.asarray(np.clip(action, low, high), action.dtype)

    def finish(self) -> None:
        """Say what was clipped.

        Raises:
            DataError: actions that lie outside and are not to be clipped.
        """
        step, bounds = self._first
        if self._steps and not self._clip:
            raise DataError(
                f"{self._where}: 'action' leaves its bounds {bounds} in {self._steps} steps "
                f"(first at step {step}); set out_of_bounds=clip, or give other action_bounds."
            )
        if self._steps:
            logger.info(
                "%s: %d of %d action entries (%.1f%%) lie outside %s and are clipped.",
                self._where, self.outside, self._entries, 100 * self.outside / self._entries, bounds,
            )  # fmt: skip

    def _described(self, dimension: int) -> str:
        pairs = list(zip(*(bound.reshape(-1).tolist() for bound in self._bounds), strict=True))
        low, high = pairs[dimension if len(pairs) > 1 else 0]
        return f"[{low:g}, {high:g}]" + (f" in dimension {dimension}" if len(set(pairs)) > 1 else "")


class TimeCheck:
    """Compares the steps' times with the declared rate: a gap inside an episode is lost data."""

    def __init__(self, fps: float, where: str, episodes: Episodes, allow_gaps: bool) -> None:
        self._period, self._where, self._episodes, self._allow = 1 / fps, where, episodes, allow_gaps
        self._last: float | None = None
        self._has_warned = False

    def rows(self, times: NDArray[Any], start: int) -> None:
        """Check the times of a block's steps, seconds, ``(rows,)`` or ``(rows, 1)``.

        Raises:
            DataError: a step that comes late by more than half a period, or not after the one before.
        """
        if not len(times) or self._has_warned:
            return
        times = np.asarray(times, np.float64).reshape(len(times), -1)[:, 0]
        before = np.concatenate([times[:1] if self._last is None else [self._last], times[:-1]])
        waits = np.where(self._episodes.begins(start, len(times)), self._period, times - before)
        self._last = float(times[-1])
        bad = ~((waits > 0) & (waits <= _GAP * self._period))
        if not bad.any():
            return
        row = int(bad.argmax())
        sentence = (
            f"{self._where}: '{self._episodes.name(start + row)}' has a step {waits[row]:.3g} s after the "
            f"one before, at {times[row]:.3f} s, where its rate says {self._period:.3g} s"
        )
        if not self._allow:
            raise DataError(f"{sentence}; fix or remove that episode, or accept it with allow_gaps=true.")
        logger.warning("%s; taken as it is.", sentence)
        self._has_warned = True

"""What rounding to float32, the type of a policy's inputs and outputs, takes from wider numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARE = 1e-3
"""Share of a dimension's range that rounding may take."""
NOISE = 1e-3
"""What is lost below this, in the dimension's own unit (m, rad, N, px), counts as noise of a constant."""
_BLOCK_ROWS = 1 << 16


class RoundingCheck:
    """Watches the rows of a key for numbers that float32 cannot tell apart.

    Rounding moves those of some dimension by more than :data:`SHARE` of its range and by more than
    :data:`NOISE`, as it does with positions in UTM metres or seconds since 1970.
    """

    def __init__(self) -> None:
        self._low: Any = np.inf
        self._high: Any = -np.inf
        self._error: Any = 0.0

    def rows(self, values: NDArray[Any]) -> None:
        """Include further rows ``(rows, ...)``."""
        if values.size == 0 or not _is_wide(values.dtype):
            return
        wide = values.reshape(len(values), -1).astype(np.float64)
        self._low = np.minimum(self._low, wide.min(axis=0))
        self._high = np.maximum(self._high, wide.max(axis=0))
        with np.errstate(over="ignore", invalid="ignore"):
            self._error = np.maximum(self._error, np.abs(wide - wide.astype(np.float32)).max(axis=0))

    @property
    def collapses(self) -> bool:
        """Whether float32 cannot distinguish the numbers so far."""
        with np.errstate(invalid="ignore"):
            spread = self._high - self._low
            lost = (self._error > SHARE * spread) & (self._error > NOISE) & (spread > 0)
        return bool(np.any(lost))


def collapses_in_float32(array: NDArray[Any]) -> bool:
    """Whether float32 cannot tell the numbers of ``array`` ``(steps, ...)`` apart.

    See :class:`RoundingCheck`.
    """
    check = RoundingCheck()
    if array.ndim and _is_wide(array.dtype):  # images, which may lie on disk, are not looked at
        for start in range(0, len(array), _BLOCK_ROWS):
            check.rows(array[start : start + _BLOCK_ROWS])
    return check.collapses


def _is_wide(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fiu" and not np.can_cast(dtype, np.float32)

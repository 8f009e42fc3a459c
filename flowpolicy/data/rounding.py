"""What float32, in which a policy sees and acts, takes from wider numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARE = 1e-3
"""Share of a dimension's range that rounding may take."""
NOISE = 1e-3
"""What is lost below this, in the dimension's own unit (m, rad, N, px), counts as noise of a constant."""
_BLOCK_ROWS = 1 << 16


def collapses_in_float32(array: NDArray[Any]) -> bool:
    """Whether float32 cannot tell the numbers of some dimension of ``array`` ``(steps, ...)`` apart.

    Rounding moves them by more than :data:`SHARE` of its range and by more than :data:`NOISE`, as it does
    with positions in UTM metres or seconds since 1970.
    """
    if array.size == 0 or array.dtype.kind not in "fiu" or np.can_cast(array.dtype, np.float32):
        return False
    rows = array.reshape(len(array), -1)
    spread = rows.max(axis=0).astype(np.float64) - rows.min(axis=0).astype(np.float64)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            error = np.abs(block - block.astype(np.float32)).max(axis=0)
        if ((error > SHARE * spread) & (error > NOISE) & (spread > 0)).any():
            return True
    return False

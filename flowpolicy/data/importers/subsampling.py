"""Fewer steps: every n-th of each episode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = dict[str, NDArray[Any]]
_JOINED: dict[str, np.ufunc] = {
    "reward": np.add,
    "terminated": np.maximum,
    "truncated": np.maximum,
    "done": np.maximum,
}
"""What happened in the steps that are left out happened since the one before that is kept."""


class Subsampling:
    """Keeps the steps 0, n, 2n, ... of each episode; rewards in between are summed, flags are joined.

    Args:
        every: n.
        lengths: steps of each episode, ``(episodes,)``.

    Attributes:
        lengths: of what is kept.
    """

    def __init__(self, every: int, lengths: NDArray[np.int64]) -> None:
        self.lengths = -(-lengths // every)
        firsts = np.repeat(np.cumsum(lengths) - lengths, self.lengths)
        within = np.arange(len(firsts)) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        self._kept = firsts + every * within
        self._ends = np.append(self._kept[1:], lengths.sum())

    def blocks(self, blocks: Iterable[Rows], after: int = 0) -> Iterator[Rows]:
        """The rows that are kept, of blocks of all rows in order, the first ``after`` episodes left out."""
        rest: Rows = {}
        done = int(self.lengths[:after].sum())
        start = int(self._ends[done - 1]) if done else 0
        for block in blocks:
            rows = {key: np.concatenate([rest[key], new]) if rest else new for key, new in block.items()}
            end = start + len(next(iter(rows.values())))
            whole = int(np.searchsorted(self._ends, end, side="right"))
            at = self._kept[done:whole] - start
            if len(at):
                last = int(self._ends[whole - 1]) - start
                yield {key: self._taken(key, values, at, last) for key, values in rows.items()}
                rest = {key: values[last:] for key, values in rows.items()} if start + last < end else {}
                start, done = start + last, whole
            else:
                rest = rows

    def _taken(self, key: str, values: NDArray[Any], at: NDArray[np.int64], last: int) -> NDArray[Any]:
        if key not in _JOINED:
            return values[at]
        return np.asarray(_JOINED[key].reduceat(values[:last], at), values.dtype)

"""A store of pairs: its segments, and the chunks that a policy decided on in them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.keys import NOT_OBSERVED
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.data.zarr_reading import open_store
from flowpolicy.errors import DataError
from flowpolicy.settings import shown

PAIRS = "preferences"
"""Attribute of a store of pairs: what they were made with."""
CHUNK, CHUNK_STEP = "chunk", "chunk_step"
"""Keys of a step's whole chunk ``(T, A)``, as the policy gave it, and of the number of its action in that; -1
of the steps before the segment, which are part of the first history alone."""
FRAME = "frame"
"""Key of a step's picture."""


@dataclass(frozen=True)
class Segment:
    """What happened in one of the two segments of a pair, in L steps.

    Attributes:
        observation: key -> ``(L, *shape)``, before each action, in physical units.
        action: ``(L, A)``, as executed.
        reward: ``(L,)``.
    """

    observation: dict[str, NDArray[Any]]
    action: NDArray[Any]
    reward: NDArray[Any]


class Pairs:
    """Pairs in memory.

    Args:
        demos: of a store that :func:`~flowpolicy.preferences.collection.collect_preferences` made; episodes
            2i and 2i + 1 are pair i.

    Attributes:
        demos: the same.

    Raises:
        DataError: it is no such store.
    """

    def __init__(self, demos: Demonstrations) -> None:
        self.demos = demos
        step = demos.arrays.get(CHUNK_STEP, np.empty(0))
        is_whole = (
            isinstance(demos.attributes.get(PAIRS), dict)
            and demos.num_episodes % 2 == 0
            and demos.arrays.get(CHUNK, np.empty(0)).ndim == 3
            and step.ndim == 1
            and step.dtype.kind == "i"
            and bool(np.logical_or.reduceat(step == 0, demos.episode_starts).all())
        )
        if not is_whole:
            raise DataError(
                f"{demos.source} holds no pairs of segments; make some with flowpolicy collect-preferences."
            )

    def __len__(self) -> int:
        return self.demos.num_episodes // 2

    @property
    def about(self) -> dict[str, Any]:
        """What they were made with."""
        return dict(self.demos.attributes[PAIRS])

    def segment(self, episode: int) -> Segment:
        """The segment of an episode."""
        rows = self.rows(episode)
        arrays = self.demos.arrays
        left_out = (*NOT_OBSERVED, CHUNK, CHUNK_STEP, FRAME)
        observation = {key: values[rows] for key, values in arrays.items() if key not in left_out}
        return Segment(observation, arrays["action"][rows], arrays["reward"][rows].reshape(-1))

    def decisions(self, episode: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The steps at which a chunk of the episode begins, among all steps, and how many of its actions were
        executed."""
        rows = self.rows(episode)
        begins = rows.start + np.flatnonzero(self.demos.arrays[CHUNK_STEP][rows] == 0)
        return begins, np.diff(begins, append=rows.stop)

    def rows(self, episode: int) -> slice:
        """The steps of an episode that belong to its segment."""
        start, end = int(self.demos.episode_starts[episode]), int(self.demos.episode_ends[episode])
        return slice(start + int(np.argmax(self.demos.arrays[CHUNK_STEP][start:end] == 0)), end)


def read_pairs(path: Path | str, keys: Collection[str] | None = None) -> Pairs:
    """Read a store of pairs without its frames; with ``keys`` only these observations.

    Raises:
        DataError: it cannot be read, or holds no pairs.
    """
    if keys is None:
        with open_store(path) as store:
            keys = [key for key in store.arrays if key not in (*NOT_OBSERVED, FRAME)]
    return Pairs(read_demonstrations(path, dict.fromkeys([*keys, CHUNK, CHUNK_STEP])))


def require_same_actions(pairs: Pairs, chunk_shape: tuple[int, int]) -> None:
    """Raise a DataError where chunks are not of this shape ``(T, A)``."""
    found = pairs.demos.arrays[CHUNK].shape[1:]
    if found != chunk_shape:
        raise DataError(
            f"{pairs.demos.source} has chunks of {shown(found)} (actions, dimensions) and the policy makes "
            f"{shown(chunk_shape)}; collect pairs with this policy."
        )

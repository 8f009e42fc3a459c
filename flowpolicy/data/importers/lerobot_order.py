"""The steps of a LeRobot dataset: which there are, and in which rows of its tables they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers import parquet
from flowpolicy.errors import DataError

EPISODE, FRAME = "episode_index", "frame_index"


class Order:
    """Where each step of each episode lies: rows of the files, in the order of episodes and frames."""

    def __init__(
        self,
        tables: Sequence[parquet.Table],
        info: dict[str, Any],
        where: str,
        episodes: Iterable[int] | None,
    ) -> None:
        self._tables = tables
        columns = [table.integers([EPISODE, FRAME]) for table in tables]
        episode = np.concatenate([column[EPISODE] for column in columns])
        frame = np.concatenate([column[FRAME] for column in columns])
        if len(episode) == 0:
            raise DataError(f"{where} holds no step; record at least one episode.")
        order = np.lexsort((frame, episode))
        episode, frame = episode[order], frame[order]
        starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
        _check_whole(episode, frame, starts, info, where)
        if episodes is not None:
            chosen = _chosen(episodes, episode[starts], where)
            kept = np.isin(episode, chosen)
            order, episode = order[kept], episode[kept]
            starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
        self.episodes: list[int] = episode[starts].tolist()
        self.names = [f"episode {number}" for number in self.episodes]
        self.lengths: NDArray[np.int64] = np.diff(np.append(starts, len(order)))
        firsts = np.cumsum([0, *(len(column[EPISODE]) for column in columns)])
        self._order, self._firsts = order, firsts

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of one number a step, in the order of episodes and frames, ``(steps,)``."""
        columns = [table.numbers([name])[name] for table in self._tables]
        return np.asarray(np.concatenate(columns)[self._order], np.float64)

    def runs(self, first: int = 0) -> Iterator[tuple[int, int, int]]:
        """File, first row in it, and rows, of each stretch that lies in a file as it is to be read, from
        step ``first`` on.
        """
        order = self._order[first:]
        file = np.searchsorted(self._firsts, order, side="right") - 1
        breaks = (np.diff(order) != 1) | (np.diff(file) != 0)
        starts = np.flatnonzero(np.concatenate([[True], breaks]))
        counts = np.diff(np.append(starts, len(order)))
        for start, count in zip(starts, counts, strict=True):
            number = int(file[start])
            yield number, int(order[start] - self._firsts[number]), int(count)


def _chosen(episodes: Iterable[int], present: NDArray[np.int64], where: str) -> list[int]:
    chosen = list(episodes) if not isinstance(episodes, (str, int)) else [episodes]
    for number in chosen:
        if type(number) is not int or number not in present:
            raise DataError(f"{where} has no episode {number!r} (options.episodes); it has {len(present)}.")
    if not chosen:
        raise DataError(f"{where}: options.episodes names none; name at least one, or leave it out.")
    return [int(number) for number in chosen]


def _check_whole(
    episode: NDArray[Any], frame: NDArray[Any], starts: NDArray[Any], info: dict[str, Any], where: str
) -> None:
    expected = np.arange(len(frame)) - np.repeat(starts, np.diff(np.append(starts, len(frame))))
    wrong = frame != expected
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{where}: episode {episode[row]} has frame {frame[row]} where {expected[row]} is expected; "
            "steps are missing or doubled, so copy the dataset again."
        )
    counts = {"total_frames": len(frame), "total_episodes": len(starts)}
    for key, found in counts.items():
        if isinstance(info.get(key), int) and info[key] != found:
            raise DataError(
                f"{where}: meta/info.json gives {key} = {info[key]} and the data hold {found}; copy it again."
            )

"""Records of the running episodes of N parallel environments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class EpisodeRecord:
    """One episode, whole or so far.

    Attributes:
        ret: its return, the undiscounted sum of its rewards.
        length: its environment steps.
        success: whether ``info["success"]`` was ever true; None where the environment has no such entry.
        score: the largest ``info["score"]``, None likewise.
        task: what ``info["task"]`` named last; empty for environments with one task.
    """

    ret: float = 0.0
    length: int = 0
    success: bool | None = None
    score: float | None = None
    task: str = ""

    def add(self, reward: float, info: Mapping[str, Any]) -> None:
        """One more step."""
        self.ret += reward
        self.length += 1
        if info:
            self.judge(info)

    def judge(self, info: Mapping[str, Any]) -> None:
        """What a step's ``info`` says of the episode."""
        if "success" in info:
            self.success = bool(self.success or info["success"])
        if "score" in info:
            score = float(info["score"])
            self.score = score if self.score is None else max(self.score, score)
        if "task" in info:
            self.task = str(info["task"])


class EpisodeTally:
    """The episodes that run in N environments, and those that ended and were not fetched.

    Attributes:
        running: the episode of each environment.
    """

    def __init__(self, num_envs: int) -> None:
        self._ended: list[EpisodeRecord] = []
        self.running = [EpisodeRecord() for _ in range(num_envs)]

    def restart(self, rows: Iterable[int] | None = None) -> None:
        """Forget the episodes that run, in some environments or in all; those that ended stay."""
        for row in range(len(self.running)) if rows is None else rows:
            self.running[row] = EpisodeRecord()

    def end(self, row: int) -> EpisodeRecord:
        """The episode of environment ``row`` is over; the next one begins there."""
        self._ended.append(self.running[row])
        self.running[row] = EpisodeRecord()
        return self._ended[-1]

    def pop(self) -> list[EpisodeRecord]:
        """The episodes that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


def columns(records: Sequence[EpisodeRecord]) -> dict[str, NDArray[Any] | None]:
    """``returns``, ``lengths``, ``success``, ``score`` and ``task`` of episodes as arrays ``(n,)``; the last
    three None where no episode has them.
    """
    has_success = any(record.success is not None for record in records)
    has_score = any(record.score is not None for record in records)
    return {
        "returns": np.array([record.ret for record in records], dtype=np.float64),
        "lengths": np.array([record.length for record in records], dtype=np.int64),
        "success": np.array([bool(record.success) for record in records]) if has_success else None,
        "score": np.array([-np.inf if record.score is None else record.score for record in records])
        if has_score
        else None,
        "task": np.array([record.task for record in records])
        if any(record.task for record in records)
        else None,
    }

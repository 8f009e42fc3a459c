"""The result of an evaluation: one value per episode, and statistics of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.evaluation.statistics import mean_interval, wilson_interval
from flowpolicy.files.storage import write_table

METRICS = {
    "return": ("return_mean", "return_ci95"),
    "success": ("success_rate", "success_ci95"),
    "score": ("score_mean", "score_ci95"),
}
"""What a task may be judged by: where :meth:`Episodes.means` has its mean and its 95% interval."""


@dataclass(frozen=True)
class Episodes:
    """How whole episodes went.

    Attributes:
        seeds: (n,) environment seed of each episode, also of its noise.
        returns: (n,) undiscounted sum of rewards.
        lengths: (n,) environment steps.
        success: (n,) true where ``info["success"]`` was true at any step; None where the task has none.
        score: (n,) largest ``info["score"]``; None where the task has none.
        task: (n,) what ``info["task"]`` named, for environments with several tasks; None otherwise.
    """

    seeds: NDArray[np.int64]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    success: NDArray[np.bool_] | None
    score: NDArray[np.float64] | None
    task: NDArray[np.str_] | None

    def means(self) -> dict[str, Any]:
        """Means with 95% intervals.

        ``episodes``, ``return_mean``, ``return_std`` (over episodes), ``return_ci95``, ``length_mean``;
        ``success_rate`` and ``success_ci95`` (Wilson), ``score_mean`` and ``score_ci95`` (bootstrap), or
        None where the task has none. ``by_task`` has the same for the episodes of each task, by name, or is
        None where the environment names none.
        """
        found: dict[str, Any] = {
            "return_mean": float(self.returns.mean()),
            "return_std": float(self.returns.std()),
            "return_ci95": list(mean_interval(self.returns)),
            "success_rate": None,
            "success_ci95": None,
            "score_mean": None,
            "score_ci95": None,
            "length_mean": float(self.lengths.mean()),
            "episodes": len(self.returns),
            "by_task": None,
        }
        if self.success is not None:
            found["success_rate"] = float(self.success.mean())
            found["success_ci95"] = list(wilson_interval(int(self.success.sum()), len(self.success)))
        if self.score is not None:
            found |= {"score_mean": float(self.score.mean()), "score_ci95": list(mean_interval(self.score))}
        if self.task is not None:
            parts = {name: self._rows(self.task == name).means() for name in np.unique(self.task).tolist()}
            found["by_task"] = {
                name: {key: value for key, value in part.items() if key != "by_task"}
                for name, part in parts.items()
            }
        return found

    def _rows(self, rows: NDArray[np.bool_]) -> Episodes:
        """Some of the episodes, of one task."""
        success = None if self.success is None else self.success[rows]
        score = None if self.score is None else self.score[rows]
        return Episodes(self.seeds[rows], self.returns[rows], self.lengths[rows], success, score, None)


@dataclass(frozen=True)
class EvaluationResult(Episodes):
    """Episodes of one policy with one sampler, and what they cost.

    Attributes:
        simulation_seconds: wall time inside the environments, of all processes together.
        inference_seconds: wall time inside the policy, likewise.
        chunks: chunks sampled.
        ms_per_chunk: median milliseconds of sampling one chunk alone (batch 1), as on a robot.
        nfe: network evaluations per chunk.
        video: the recording, where one was made.
    """

    simulation_seconds: float
    inference_seconds: float
    chunks: int
    ms_per_chunk: float
    nfe: int
    video: Path | None = None

    def metrics(self) -> dict[str, Any]:
        """The summary's figures: :meth:`means`, ``nfe``, ``ms_per_chunk``, ``ms_per_chunk_batched``."""
        return {
            **self.means(),
            "nfe": self.nfe,
            "ms_per_chunk": self.ms_per_chunk,
            "ms_per_chunk_batched": 1000 * self.inference_seconds / max(1, self.chunks),
            "simulation_seconds": self.simulation_seconds,
            "inference_seconds": self.inference_seconds,
        }

    def scalars(self) -> dict[str, float]:
        """What a training log takes: ``evaluation/return`` and its ``_low``, ``_high``, and so on.

        Where there are several tasks, also ``evaluation/success/<task>``.
        """
        found = self.metrics()
        logged = {"evaluation/episodes": float(found["episodes"])}
        for name, (mean, interval) in METRICS.items():
            if found[mean] is not None:
                logged[f"evaluation/{name}"] = found[mean]
                logged[f"evaluation/{name}_low"], logged[f"evaluation/{name}_high"] = found[interval]
        for name, row in (found["by_task"] or {}).items():
            if row["success_rate"] is not None:
                logged[f"evaluation/success/{name}"] = row["success_rate"]
        return logged

    def write_csv(self, path: Path | str) -> Path:
        """One line per episode: seed, return, length, and success, score and task where there are such."""
        success = None if self.success is None else self.success.astype(int)
        columns = {
            "seed": self.seeds, "return": self.returns, "length": self.lengths,
            "success": success, "score": self.score, "task": self.task,
        }  # fmt: skip
        return write_table({name: column for name, column in columns.items() if column is not None}, path)


def concatenate(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Join results over consecutive seeds into one; times add up, latencies give their median."""
    columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(Episodes)}
    return EvaluationResult(
        **{name: _joined(arrays) for name, arrays in columns.items()},
        simulation_seconds=sum(part.simulation_seconds for part in parts),
        inference_seconds=sum(part.inference_seconds for part in parts),
        chunks=sum(part.chunks for part in parts),
        ms_per_chunk=float(np.median([part.ms_per_chunk for part in parts])),
        nfe=parts[0].nfe,
        video=next((part.video for part in parts if part.video is not None), None),
    )


def _joined(arrays: Sequence[NDArray[Any] | None]) -> Any:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if len(present) == len(arrays) else None

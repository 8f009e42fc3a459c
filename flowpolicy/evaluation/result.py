"""What an evaluation found: one number per episode, and the figures made of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.evaluation.statistics import mean_interval, wilson_interval
from flowpolicy.files.storage import atomic_file


@dataclass(frozen=True)
class Episodes:
    """How whole episodes went.

    Attributes:
        seeds: (n,) environment seed of each episode, also of its noise.
        returns: (n,) undiscounted sum of rewards.
        lengths: (n,) environment steps.
        success: (n,) true where ``info["success"]`` was true at any step; None where the task has none.
        score: (n,) largest ``info["score"]``; None where the task has none.
        task: (n,) what ``info["task"]`` named, where an environment plays several tasks; None elsewhere.
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
        success = self.success
        return {
            "return_mean": float(self.returns.mean()),
            "return_std": float(self.returns.std()),
            "return_ci95": list(mean_interval(self.returns)),
            "success_rate": None if success is None else float(success.mean()),
            "success_ci95": None
            if success is None
            else list(wilson_interval(int(success.sum()), len(success))),
            "score_mean": None if self.score is None else float(self.score.mean()),
            "score_ci95": None if self.score is None else list(mean_interval(self.score)),
            "length_mean": float(self.lengths.mean()),
            "episodes": len(self.returns),
            "by_task": self._by_task(),
        }

    def _by_task(self) -> dict[str, Any] | None:
        if self.task is None:
            return None
        found = {}
        for name in np.unique(self.task).tolist():
            rows = self.task == name
            found[name] = Episodes(
                self.seeds[rows],
                self.returns[rows],
                self.lengths[rows],
                None if self.success is None else self.success[rows],
                None if self.score is None else self.score[rows],
                None,
            ).means()
            del found[name]["by_task"]
        return found


@dataclass(frozen=True)
class EvaluationResult(Episodes):
    """Episodes of one policy with one sampler, and what they cost.

    Attributes:
        simulation_seconds: wall time inside the environments, of all processes together.
        inference_seconds: wall time inside the policy, likewise.
        chunks: chunks planned.
        ms_per_chunk: median milliseconds of planning one chunk alone (batch 1), as on a robot.
        nfe: network evaluations per chunk.
        video: the film, where one was made.
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
        for name, mean, interval in (
            ("return", "return_mean", "return_ci95"),
            ("success", "success_rate", "success_ci95"),
            ("score", "score_mean", "score_ci95"),
        ):
            if found[mean] is not None:
                logged[f"evaluation/{name}"] = found[mean]
                logged[f"evaluation/{name}_low"], logged[f"evaluation/{name}_high"] = found[interval]
        for name, row in (found["by_task"] or {}).items():
            if row["success_rate"] is not None:
                logged[f"evaluation/success/{name}"] = row["success_rate"]
        return logged

    def write_csv(self, path: Path | str) -> Path:
        """One line per episode: seed, return, length, and success, score and task where there are such."""
        columns: dict[str, Any] = {"seed": self.seeds, "return": self.returns, "length": self.lengths}
        if self.success is not None:
            columns["success"] = self.success.astype(int)
        if self.score is not None:
            columns["score"] = self.score
        if self.task is not None:
            columns["task"] = self.task
        with atomic_file(path) as temporary, temporary.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        return Path(path)


def concatenate(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Join results over consecutive seeds into one; times add up, latencies give their median."""
    return EvaluationResult(
        seeds=np.concatenate([part.seeds for part in parts]),
        returns=np.concatenate([part.returns for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        success=_joined([part.success for part in parts]),
        score=_joined([part.score for part in parts]),
        task=_joined([part.task for part in parts]),
        simulation_seconds=sum(part.simulation_seconds for part in parts),
        inference_seconds=sum(part.inference_seconds for part in parts),
        chunks=sum(part.chunks for part in parts),
        ms_per_chunk=float(np.median([part.ms_per_chunk for part in parts])),
        nfe=parts[0].nfe,
        video=next((part.video for part in parts if part.video is not None), None),
    )


def _joined(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if len(present) == len(arrays) else None

"""Summary statistics of a run's telemetry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.telemetry import SOURCES
from flowpolicy.evaluation.statistics import percentiles

Columns = Mapping[str, NDArray[Any]]


def run_statistics(columns: Columns, period: float) -> dict[str, Any]:
    """Figures of a run.

    Args:
        columns: of :meth:`flowpolicy.control.telemetry.Telemetry.columns`.
        period: of the loop, s.

    Returns:
        ``ticks``, rows of the telemetry; ``missed``, ticks between them that did not happen; ``seconds``;
        ``jitter_ms``, start after deadline, and ``work_us``, start to command sent, as p50, p95, p99, p99.9
        and max; ``drift_us_per_s``, the slope of the lateness over the run, and ``drift_us``, its last value
        minus its first; ``observation_age_ms`` and ``inference_ms`` likewise; ``delays``, actions executed
        while a chunk was under way to the number of such chunks; ``sources``, shares by where actions came
        from; ``seam`` and ``inside``, the mean change of the command at a change of chunk and elsewhere,
        ``seam_p95`` and ``inside_p95`` likewise, in root mean square of the observed action ranges.
    """
    count = len(columns["tick"])
    if count == 0:
        return {"ticks": 0}
    late = columns["started"] - columns["deadline"]
    work = columns["finished"] - columns["started"]
    age, inference = columns["observation_age"], columns["inference"]
    arrived = columns["delay"][columns["delay"] >= 0]
    seconds = (columns["tick"] - columns["tick"].mean()) * period
    slope = float(np.polyfit(seconds, late, 1)[0]) if count > 1 else 0.0
    delays, numbers = np.unique(arrived, return_counts=True)
    return {
        "ticks": count,
        "missed": int(columns["tick"][-1] - columns["tick"][0]) + 1 - count,
        "seconds": float(columns["tick"][-1] - columns["tick"][0] + 1) * period,
        "jitter_ms": percentiles(1e3 * late),
        "drift_us_per_s": slope * 1e6,
        "drift_us": float(late[-1] - late[0]) * 1e6,
        "work_us": percentiles(1e6 * work),
        "observation_age_ms": _finite(1e3 * age),
        "inference_ms": _finite(1e3 * inference),
        "delays": {str(ticks): int(n) for ticks, n in zip(delays, numbers, strict=True)},
        "sources": {name: float(np.mean(columns["source"] == name)) for name in SOURCES},
        **_seams(columns),
    }


def actions_of(columns: Columns) -> NDArray[np.float32]:
    """Commands ``(ticks, A)``; NaN where nothing was sent."""
    names = [name for name in columns if name.startswith("action_")]
    return np.stack([columns[name] for name in names], axis=1)


def changes_of(columns: Columns) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Sizes of the changes of the command from one tick to the next, and which are at a change of chunk.

    Returns:
        Both ``(n,)``; pairs of ticks with a missed one between them, without a command, or with the safe
        action are left out.
    """
    actions = actions_of(columns).astype(np.float64)
    known = np.isfinite(actions).all(axis=1)
    if known.sum() < 2:
        return np.zeros(0), np.zeros(0, dtype=bool)
    width = np.ptp(actions[known], axis=0)
    size = np.sqrt(((np.diff(actions, axis=0) / np.where(width > 0, width, 1.0)) ** 2).mean(axis=1))
    sampled = columns["source"] != "safe"
    kept = (np.diff(columns["tick"]) == 1) & np.isfinite(size) & sampled[1:] & sampled[:-1]
    return size[kept], np.diff(columns["chunk"])[kept] != 0


def _seams(columns: Columns) -> dict[str, float | None]:
    """Changes of the command at a change of chunk, and inside chunks."""
    size, is_seam = changes_of(columns)
    found: dict[str, float | None] = {}
    for name, values in (("seam", size[is_seam]), ("inside", size[~is_seam])):
        found[name] = float(values.mean()) if len(values) else None
        found[f"{name}_p95"] = float(np.quantile(values, 0.95)) if len(values) else None
    return found


def _finite(values: NDArray[Any]) -> dict[str, float] | None:
    known = values[np.isfinite(values)]
    return percentiles(known.astype(np.float64)) if len(known) else None

"""Settings of the choice of a sampler for a deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowpolicy.acceleration.sampler import BACKENDS
from flowpolicy.settings import choose, require

PLANNING_SEED = 6_000_000
"""First environment seed of validation episodes."""


@dataclass(frozen=True)
class PlanConfig:
    """Settings of `scripts/plan.py`.

    Attributes:
        checkpoint: folder of the policy.
        period_ms: within which a call must end.
        quantile: share of the calls that must.
        max_action_error: bound of the rms error to the policy's best sampling, normalised actions.
        margin: share of the period left free. A bound of the calls measured now says nothing of a machine
            that is busier later: neighbours come and go, caches and clocks drift.
        backends: to try; those that cannot run here are left out.
        schedules: files of cache schedules to try beside uniform ones.
        search_iterations: moves of the search for schedules; 0 tries uniform ones only.
        calls: timed calls of each candidate that may be in time.
        bouts: parts that the calls are taken in, apart from each other; the worst one counts.
        pause_s: from one bout to the next, so that a short disturbance does not meet all of them.
        observations: that errors are measured on.
        episodes: of each candidate at the front, with its latency injected.
        front: most candidates that are tried in episodes.
        strategy: fusion of the episodes: ``switch`` or ``ensemble``.
        safe_action: of the episodes; None takes the task's, or ``hold``.
        seed: of noises and episodes.
        device: of the policy.
        threads: CPU threads.
    """

    checkpoint: str
    period_ms: float
    quantile: float = 0.99
    max_action_error: float = 0.1
    margin: float = 0.1
    backends: tuple[str, ...] = ("onnx", "eager", "compile", "cuda_graph")
    schedules: tuple[str, ...] = ()
    search_iterations: int = 40
    calls: int = 2000
    bouts: int = 4
    pause_s: float = 2.0
    observations: int = 64
    episodes: int = 50
    front: int = 4
    strategy: str = "switch"
    safe_action: str | None = None
    seed: int = PLANNING_SEED
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        require(self.period_ms > 0, "period_ms", self.period_ms, "positive")
        require(0.5 <= self.quantile < 1, "quantile", self.quantile, "at least 0.5 and below 1")
        require(self.max_action_error > 0, "max_action_error", self.max_action_error, "positive")
        require(0 <= self.margin < 1, "margin", self.margin, "at least 0 and below 1")
        least = math.ceil(3 / (1 - self.quantile))
        require(
            self.calls >= least,
            "calls",
            self.calls,
            f"at least {least} to bound the {self.quantile} quantile",
        )
        for name in ("bouts", "observations", "episodes", "front", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("search_iterations", "pause_s"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(bool(self.backends), "backends", self.backends, "at least one")
        for backend in self.backends:
            choose(BACKENDS, backend, "backends")
        strategies = ("switch", "ensemble")
        require(self.strategy in strategies, "strategy", self.strategy, " or ".join(strategies))

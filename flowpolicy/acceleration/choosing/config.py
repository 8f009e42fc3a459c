"""Settings of the choice of a sampler for a deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from flowpolicy.acceleration.sampler import BACKENDS
from flowpolicy.ranges import (
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    not_empty,
    one_of,
    within,
)
from flowpolicy.settings import Settings, choose, require

PLANNING_SEED = 6_000_000
"""First environment seed of validation episodes."""


@dataclass(frozen=True)
class PlanConfig(Settings):
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
        solvers: files of searched solvers to try.
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
    period_ms: PositiveFloat
    quantile: Annotated[float, within("[0.5, 1)")] = 0.99
    max_action_error: PositiveFloat = 0.1
    margin: BelowOne = 0.1
    backends: Annotated[tuple[str, ...], not_empty("backend")] = ("onnx", "eager", "compile", "cuda_graph")
    schedules: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()
    search_iterations: NonNegativeInt = 40
    calls: int = 2000
    bouts: PositiveInt = 4
    pause_s: NonNegativeFloat = 2.0
    observations: PositiveInt = 64
    episodes: PositiveInt = 50
    front: PositiveInt = 4
    strategy: Annotated[str, one_of(("switch", "ensemble"))] = "switch"
    safe_action: str | None = None
    seed: int = PLANNING_SEED
    device: str = "auto"
    threads: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = math.ceil(3 / (1 - self.quantile))
        allowed = f"at least {least} to bound the {self.quantile} quantile"
        require(self.calls >= least, "calls", self.calls, allowed)
        for backend in self.backends:
            choose(BACKENDS, backend, "backends")

"""How long candidates take on this machine, as what a quantile of their calls is below."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.acceleration.sampler import Sampler, build_sampler
from flowpolicy.control.delayed import DelayedResult
from flowpolicy.control.planning.candidates import Candidate
from flowpolicy.control.planning.config import PlanConfig
from flowpolicy.errors import BackendError
from flowpolicy.policy import FlowPolicy
from flowpolicy.progress import progress

NOT_HERE = "not here"
"""Beginning of the verdict on a backend that cannot run."""
CONFIDENCE_Z = 1.645
"""One-sided 95%."""


@dataclass
class Measured:
    """A candidate in one backend.

    Attributes:
        candidate: the way to sample.
        backend: that runs it.
        milliseconds: of every timed call, bout by bout.
        bound: what the quantile is below; see :func:`upper_bound`.
        verdict: ``in time``, ``too slow``, ``too inexact``, or ``not here: `` and why.
        rollouts: its episodes, where it was tried.
    """

    candidate: Candidate
    backend: str
    milliseconds: list[NDArray[np.float64]] = dataclasses.field(default_factory=list)
    bound: float = float("nan")
    verdict: str = ""
    rollouts: DelayedResult | None = None

    def all_calls(self) -> NDArray[np.float64]:
        """All timed calls, ms."""
        return np.concatenate(self.milliseconds) if self.milliseconds else np.zeros(0)


def upper_bound(bouts: Sequence[NDArray[np.float64]], quantile: float) -> float:
    """What a quantile of the latency is below: over all calls with 95% confidence, and in the worst bout.

    The first is an order statistic, valid for any distribution of independent calls. Calls are not
    independent where others use the machine; that is what the bouts are for.
    """
    together = np.sort(np.concatenate(bouts))
    count = len(together)
    rank = math.ceil(count * quantile + CONFIDENCE_Z * math.sqrt(count * quantile * (1 - quantile)))
    overall = together[min(rank, count - 1)]
    worst = max(float(np.quantile(bout, quantile, method="higher")) for bout in bouts)
    return max(float(overall), worst)


def measure(
    policy: FlowPolicy, judged: Sequence[Candidate], observations: Mapping[str, Tensor], config: PlanConfig
) -> list[Measured]:
    """Time those that are exact enough, turn by turn; those that are far too slow only a few times."""
    rows = [Measured(item, backend) for item in judged for backend in config.backends]
    for row in rows:
        if not row.candidate.error <= config.max_action_error:
            row.verdict = "too inexact"
    limit = config.period_ms * (1 - config.margin)
    batches = [
        {key: value[i : i + 1] for key, value in observations.items()} for i in range(config.observations)
    ]
    timers: list[tuple[Measured, Sampler]] = []
    for backend in config.backends:
        rate: float | None = None  # ms for one evaluation's work, from the last one that was built
        for row in rows:
            if row.backend != backend or row.verdict:
                continue
            if rate is not None and rate * row.candidate.work > 2 * limit:
                row.verdict = "too slow (not built)"
                continue
            try:
                sampler = _build(policy, row)
            except BackendError as error:
                for other in rows:
                    if other.backend == backend:
                        other.verdict = other.verdict or f"{NOT_HERE}: {error}"
                break
            row.milliseconds = [_timed(sampler, batches, 20, config.seed)]
            rate = float(np.median(row.milliseconds[0])) / row.candidate.work
            if np.median(row.milliseconds[0]) > limit:
                row.verdict, row.bound = "too slow", upper_bound(row.milliseconds, config.quantile)
            else:
                timers.append((row, sampler))
    for row, _ in timers:
        row.milliseconds = []
    each = -(-config.calls // config.bouts)
    for bout in progress(config.bouts, "timing"):
        for row, sampler in timers:
            row.milliseconds.append(_timed(sampler, batches, each, config.seed + bout))
    for row, _ in timers:
        row.bound = upper_bound(row.milliseconds, config.quantile)
        row.verdict = "in time" if row.bound <= limit else "too slow"
    return rows


def _build(policy: FlowPolicy, row: Measured) -> Sampler:
    item = row.candidate
    return build_sampler(policy, 1, item.num_steps, item.solver, item.schedule, row.backend)


def _timed(
    sampler: Sampler, batches: Sequence[Mapping[str, Tensor]], calls: int, seed: int
) -> NDArray[np.float64]:
    """Milliseconds of ``calls`` calls after a few that are not counted."""
    generator = torch.Generator().manual_seed(seed)
    on_gpu = sampler.device.type == "cuda"
    seconds = []
    for call in range(-3, calls):
        noise = torch.randn(1, sampler.action_horizon, sampler.action_dim, generator=generator)
        started = time.perf_counter()
        chunk = sampler(batches[call % len(batches)], noise)
        if on_gpu:
            chunk.cpu()
        if call >= 0:
            seconds.append(time.perf_counter() - started)
    return 1e3 * np.array(seconds)

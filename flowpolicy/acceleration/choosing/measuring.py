"""Latency of candidates on this machine: an upper bound of a quantile of their calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.acceleration.choosing.candidates import Candidate
from flowpolicy.acceleration.choosing.config import PlanConfig
from flowpolicy.acceleration.sampler import Sampler, build_sampler
from flowpolicy.errors import BackendError
from flowpolicy.evaluation.delayed import DelayedResult
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.progress import progress

NOT_HERE = "not here"
"""Beginning of the verdict on a backend that cannot run."""
CONFIDENCE = 0.95
SHORT_CALLS = 40
"""Calls after which those that are hopeless are left out."""
CLEARLY_FASTER = 0.6
"""Share of another's time at which a sampler makes it pointless, if it is as exact."""


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


def bounding_rank(count: int, quantile: float) -> int:
    """Which of ``count`` sorted calls, from 1, the quantile is below with 95% confidence.

    For any distribution of independent calls: the r-th smallest is below the q-quantile only where r or more
    calls are, so r is the least with P(Binomial(count, q) >= r) <= 5%. The last one where there are too few
    calls for a bound, fewer than log(0.05) / log(q).
    """
    below = torch.arange(count + 1, dtype=torch.float64)
    size, share = torch.tensor(float(count), dtype=torch.float64), torch.tensor(quantile, dtype=torch.float64)
    ways = torch.lgamma(size + 1) - torch.lgamma(below + 1) - torch.lgamma(size - below + 1)
    at_most = (ways + below * share.log() + (size - below) * (-share).log1p()).exp().cumsum(0)
    return min(int(torch.searchsorted(at_most, CONFIDENCE)) + 1, count)


def upper_bound(bouts: Sequence[NDArray[np.float64]], quantile: float) -> float:
    """What a quantile of the latency is below: over all calls with 95% confidence, and in the worst bout.

    The first is an order statistic; see :func:`bounding_rank`. Its calls should be independent, and where
    others use the machine they are not: latency drifts over seconds and minutes. That is what the bouts are
    for, and what the plan's ``margin`` is for.
    """
    together = np.sort(np.concatenate(bouts))
    overall = together[bounding_rank(len(together), quantile) - 1]
    return max(float(overall), *(_quantile(bout, quantile) for bout in bouts))


def measure(
    policy: FlowPolicy, judged: Sequence[Candidate], observations: Mapping[str, Tensor], config: PlanConfig
) -> list[Measured]:
    """Time those that are exact enough, turn by turn: a few calls each, then many of those that may do.

    Returns:
        A row for each candidate in each backend; those that were not timed say why in their verdict.
    """
    rows = [Measured(item, backend) for item in judged for backend in config.backends]
    for row in rows:
        if not row.candidate.error_bound <= config.max_action_error:
            row.verdict = "too inexact"
    batches = [
        {key: value[i : i + 1] for key, value in observations.items()}
        for i in range(len(next(iter(observations.values()))))
    ]
    running = _without_pointless(_tried_shortly(policy, rows, batches, config))
    each = -(-config.calls // config.bouts)
    for bout in progress(config.bouts, "timing"):
        if bout:
            time.sleep(config.pause_s)
        for row, sampler in list(running):
            row.milliseconds.append(_timed(sampler, batches, each, config.seed + bout))
            row.bound = upper_bound(row.milliseconds, config.quantile)
            # The worst bout counts, so that one bad bout decides.
            if _quantile(row.milliseconds[-1], config.quantile) > _limit(config):
                row.verdict = "too slow"
                running.remove((row, sampler))
    for row, _ in running:
        row.verdict = "in time" if row.bound <= _limit(config) else "too slow"
    return rows


def _limit(config: PlanConfig) -> float:
    """Milliseconds that a bound may reach."""
    return config.period_ms * (1 - config.margin)


def _tried_shortly(
    policy: FlowPolicy, rows: Sequence[Measured], batches: Sequence[Mapping[str, Tensor]], config: PlanConfig
) -> list[tuple[Measured, Sampler]]:
    """Samplers that may be in time, in each backend from little work to much; other rows get a verdict."""
    found: list[tuple[Measured, Sampler]] = []
    exports: dict[str, bytes] = {}  # the candidates differ in their steps, not in the network
    for backend in config.backends:
        rate = 0.0  # ms for one evaluation's work, from the last one that was built
        for row in progress([r for r in rows if r.backend == backend and not r.verdict], backend):
            if row.verdict:  # found out meanwhile
                continue
            if rate * row.candidate.work > 2 * _limit(config):
                row.verdict = "too slow (not built)"
                continue
            try:
                sampler = _build(policy, row, exports)
            except BackendError as error:
                for other in rows:
                    if other.backend == backend:
                        other.verdict = other.verdict or f"{NOT_HERE}: {error}"
                break
            row.milliseconds = [_timed(sampler, batches, SHORT_CALLS, config.seed)]
            row.bound = upper_bound(row.milliseconds, config.quantile)
            rate = _least(row) / row.candidate.work
            if _least(row) > _limit(config):
                row.verdict = "too slow"
            else:
                found.append((row, sampler))
    return found


def _without_pointless(tried: Sequence[tuple[Measured, Sampler]]) -> list[tuple[Measured, Sampler]]:
    """Those that no other one, as exact, is clearly faster than; their short timing is forgotten."""
    kept = []
    for row, sampler in tried:
        better = [
            other for other, _ in tried
            if other.candidate.error <= row.candidate.error and _least(other) < CLEARLY_FASTER * _least(row)
        ]  # fmt: skip
        if better:
            best = min(better, key=_least)
            row.verdict = f"slower than {best.candidate.name} in {best.backend}"
        else:
            kept.append((row, sampler))
    for row, _ in kept:
        row.milliseconds = []
    return kept


def _least(row: Measured) -> float:
    """What a call takes by itself: the fast tenth, which others on the machine hardly touch."""
    return float(np.quantile(row.milliseconds[0], 0.1))


def _quantile(milliseconds: NDArray[np.float64], quantile: float) -> float:
    return float(np.quantile(milliseconds, quantile, method="higher"))


def _build(policy: FlowPolicy, row: Measured, exports: dict[str, bytes]) -> Sampler:
    item = row.candidate
    return build_sampler(policy, item.sampling, schedule=item.schedule, backend=row.backend, exports=exports)


def _timed(
    sampler: Sampler, batches: Sequence[Mapping[str, Tensor]], calls: int, seed: int
) -> NDArray[np.float64]:
    """Milliseconds of ``calls`` calls after a few that are not counted."""
    generator = torch.Generator().manual_seed(seed)
    on_gpu = sampler.device.type == "cuda"
    seconds = []
    for call in range(-3, calls):
        noise = torch.randn(1, *sampler.spec.noise_shape, generator=generator)
        started = time.perf_counter()
        chunk = sampler(batches[call % len(batches)], noise)
        if on_gpu:
            chunk.cpu()
        if call >= 0:
            seconds.append(time.perf_counter() - started)
    return 1e3 * np.array(seconds)

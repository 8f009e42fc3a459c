"""Candidate samplers of a policy, with their action error to its best sampling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey
from flowpolicy.acceleration.caching.scheduling import uniform
from flowpolicy.acceleration.caching.search import ActionError, search
from flowpolicy.acceleration.sampler import accelerate
from flowpolicy.errors import ConfigError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.blocks import AddressableBlocks
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.progress import progress

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 50, 64, 100)
HIGHER_ORDER_STEPS = (1, 2, 3, 4, 5, 6, 8, 12)
MULTISTEP_STEPS = (2, 3, 4, 5, 6, 8)
MULTISTEP_GRIDS = ("uniform", "shifted")
REFERENCE_STEPS = 100
CACHED_FROM = 20
"""Least K at which cache schedules are tried: below it there is little to reuse."""
SEARCHED_STEPS = (20, 32, 50, 100)
"""K at which schedules are also searched for."""
CONFIDENCE_Z = 1.645
"""One-sided 95%."""


@dataclass(frozen=True)
class Candidate:
    """A way to sample, whatever computes it.

    Attributes:
        sampling: K, solver and grid.
        schedule: of cached blocks, or None.
        nfe: network evaluations.
        error: rms to the policy's best sampling with the same noise, normalised actions; NaN until measured.
        error_bound: what it is below on other observations, at 95% confidence.
        largest_error: of any action.
    """

    sampling: SamplerSpec
    schedule: Schedule | None
    nfe: int
    error: float = float("nan")
    error_bound: float = float("nan")
    largest_error: float = float("nan")

    @property
    def share(self) -> float:
        """f, blocks recomputed."""
        return 1.0 if self.schedule is None else self.schedule.share

    @property
    def work(self) -> float:
        """Network evaluations' worth of recomputed blocks."""
        return self.nfe * self.share

    @property
    def name(self) -> str:
        """As tables spell it."""
        cached = "" if self.schedule is None else f", {self.schedule.method} cache f = {self.share:.2f}"
        grid = f" {self.sampling.grid_object.name} grid" if self.sampling.grid else ""
        return f"K = {self.sampling.num_steps} {self.sampling.solver}{grid}{cached}"

    def beats(self, other: Candidate) -> bool:
        """As exact with no more work and no more evaluations, and better in one: faster in any backend."""
        mine = (self.nfe, round(self.work, 6), self.error)
        theirs = (other.nfe, round(other.work, 6), other.error)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def reference_of(policy: FlowPolicy) -> SamplerSpec:
    """The policy's best sampling: the tuned one, a shortcut model's finest, or K = 100."""
    if policy.config.tuned is None:
        for steps in (REFERENCE_STEPS, *_powers_of_two(policy)):
            sampling = SamplerSpec(num_steps=steps, solver="euler")
            if _is_valid(policy, sampling):
                return sampling
    return policy.sampling


def candidates_of(
    policy: FlowPolicy, extra: Sequence[Schedule] = (), searched: Sequence[SamplerSpec] = ()
) -> list[Candidate]:
    """Every valid K, solver and grid, uniform schedules where K is large, and the given ones; least work
    first."""
    found = []
    for sampling in (*_samplings(policy), *map(policy.checked, searched)):
        found.append(Candidate(sampling, None, policy.objective.nfe(sampling)))
        if sampling.solver == "euler" and sampling.steps >= CACHED_FROM:
            found += [_cached(schedule) for schedule in _uniform_schedules(policy, sampling)]
    for schedule in extra:
        schedule.check(policy, SamplerSpec(**schedule.key.sampling()))
        found.append(_cached(schedule))
    return sorted(found, key=lambda candidate: candidate.work)


def searched_schedules(
    policy: FlowPolicy, observations: Mapping[str, Tensor], iterations: int, seed: int
) -> list[Schedule]:
    """Schedules with the work of the uniform ones, found on ``observations``, key -> ``(N, T_o, *shape)``."""
    found = []
    for sampling in _samplings(policy):
        if sampling.solver != "euler" or sampling.steps not in SEARCHED_STEPS:
            continue
        for start in _uniform_schedules(policy, sampling):
            error = ActionError(policy, observations, start, seed)
            budget = sum(map(len, start.updates))
            found.append(search(error, [start], budget, iterations=iterations, seed=seed))
    return found


def with_errors(
    policy: FlowPolicy, candidates: Sequence[Candidate], observations: Mapping[str, Tensor], seed: int
) -> Iterator[Candidate]:
    """The candidates with their errors on ``observations``, key -> ``(N, T_o, *shape)``."""
    rows = len(next(iter(observations.values())))
    noise = policy.noise(rows, None, torch.Generator().manual_seed(seed))
    wanted = policy.encode(policy.act(observations, sampler=reference_of(policy), noise=noise), observations)
    for item in progress(candidates, "compare samplers"):
        if item.schedule is None:
            chunk = policy.act(observations, sampler=item.sampling, noise=noise)
        else:
            chunk = accelerate(policy, item.schedule, batch_size=rows)(observations, noise)
        difference = policy.encode(chunk, observations) - wanted
        squares = difference.square().flatten(1).mean(1)
        # The mean over observations is itself an estimate; its own standard error goes into the bound.
        sure = squares.mean() + CONFIDENCE_Z * squares.std() / math.sqrt(rows) if rows > 1 else squares.mean()
        yield dataclasses.replace(
            item, error=float(squares.mean().sqrt()), error_bound=float(sure.sqrt()),
            largest_error=float(difference.abs().max()),
        )  # fmt: skip


def _cached(schedule: Schedule) -> Candidate:
    return Candidate(SamplerSpec(**schedule.key.sampling()), schedule, schedule.key.num_evaluations)


def _uniform_schedules(policy: FlowPolicy, sampling: SamplerSpec) -> list[Schedule]:
    """A tenth and a quarter of the evaluations recomputed."""
    if not isinstance(policy.network, AddressableBlocks):
        return []
    key, steps = ScheduleKey.of(policy, sampling), sampling.steps
    return [
        Schedule(
            key, (uniform(key.num_evaluations, updates),) * len(key.blocks), "uniform", {"updates": updates}
        )
        for updates in sorted({max(2, steps // 10), max(2, steps // 4)})
    ]


def _samplings(policy: FlowPolicy) -> Iterator[SamplerSpec]:
    if policy.config.tuned is not None:
        yield policy.sampling
        return
    wished = [SamplerSpec(num_steps=steps, solver="euler") for steps in STEPS]
    wished += [
        SamplerSpec(num_steps=steps, solver=solver)
        for solver in ("midpoint", "heun", "taylor")
        for steps in HIGHER_ORDER_STEPS
    ]
    wished += [
        SamplerSpec(num_steps=steps, solver=solver, grid={"name": grid})
        for solver in ("ab2", "ab3")
        for grid in MULTISTEP_GRIDS
        for steps in MULTISTEP_STEPS
    ]
    for sampling in wished:
        if _is_valid(policy, sampling):
            yield sampling


def _powers_of_two(policy: FlowPolicy) -> list[int]:
    """From a shortcut model's finest step down."""
    return [2**doublings for doublings in reversed(range(policy.objective.levels))]


def _is_valid(policy: FlowPolicy, sampling: SamplerSpec) -> bool:
    try:
        policy.checked(sampling)
    except ConfigError:
        return False
    return True

"""Ways to sample a policy, with how far their actions are from its best sampling."""

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
from flowpolicy.policy import FlowPolicy

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 50, 64, 100)
HIGHER_ORDER_STEPS = (1, 2, 3, 4, 5, 6, 8, 12)
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
        num_steps: K.
        solver: of the ODE.
        schedule: of cached blocks, or None.
        nfe: network evaluations.
        error: rms to the policy's best sampling with the same noise, normalised actions; NaN until measured.
        error_bound: what it is below on other observations, at 95% confidence.
        largest_error: of any action.
    """

    num_steps: int
    solver: str
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
        return f"K = {self.num_steps} {self.solver}{cached}"

    def beats(self, other: Candidate) -> bool:
        """As exact with no more work and no more evaluations, and better in one: faster in any backend."""
        mine = (self.nfe, round(self.work, 6), self.error)
        theirs = (other.nfe, round(other.work, 6), other.error)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def reference_of(policy: FlowPolicy) -> tuple[int, str]:
    """K and solver of the policy's best sampling: the tuned ones, a shortcut model's finest, or K = 100."""
    if policy.config.tuned_num_steps is not None:
        return policy.config.tuned_num_steps, policy.config.tuned_solver
    for steps in (REFERENCE_STEPS, *_powers_of_two(policy)):
        if _is_valid(policy, steps, "euler"):
            return steps, "euler"
    return policy.default_num_steps, policy.config.tuned_solver


def candidates_of(policy: FlowPolicy, extra: Sequence[Schedule] = ()) -> list[Candidate]:
    """Every valid K and solver, uniform schedules where K is large, and the given ones; least work first."""
    found = []
    for steps, solver in _samplings(policy):
        if not _is_valid(policy, steps, solver):
            continue
        found.append(Candidate(steps, solver, None, policy.nfe(steps, solver)))
        if solver == "euler" and steps >= CACHED_FROM:
            found += [_cached(schedule) for schedule in _uniform_schedules(policy, steps, solver)]
    for schedule in extra:
        schedule.check(policy, schedule.key.num_steps, schedule.key.solver)
        found.append(_cached(schedule))
    return sorted(found, key=lambda candidate: candidate.work)


def searched_schedules(
    policy: FlowPolicy, observations: Mapping[str, Tensor], iterations: int, seed: int
) -> list[Schedule]:
    """Schedules with the work of the uniform ones, found on ``observations``, key -> ``(N, T_o, *shape)``."""
    found = []
    for steps, solver in _samplings(policy):
        if solver != "euler" or steps not in SEARCHED_STEPS or not _is_valid(policy, steps, solver):
            continue
        for start in _uniform_schedules(policy, steps, solver):
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
    normalize = policy.action_normalizer.normalize
    steps, solver = reference_of(policy)
    wanted = normalize(policy.act(observations, num_steps=steps, solver=solver, noise=noise))
    for item in candidates:
        if item.schedule is None:
            chunk = policy.act(observations, num_steps=item.num_steps, solver=item.solver, noise=noise)
        else:
            chunk = accelerate(policy, item.schedule, batch_size=rows)(observations, noise)
        difference = normalize(chunk) - wanted
        squares = difference.square().flatten(1).mean(1)
        # The mean over observations is itself an estimate; its own standard error goes into the bound.
        sure = squares.mean() + CONFIDENCE_Z * squares.std() / math.sqrt(rows) if rows > 1 else squares.mean()
        yield dataclasses.replace(
            item, error=float(squares.mean().sqrt()), error_bound=float(sure.sqrt()),
            largest_error=float(difference.abs().max()),
        )  # fmt: skip


def _cached(schedule: Schedule) -> Candidate:
    key = schedule.key
    return Candidate(key.num_steps, key.solver, schedule, key.num_evaluations)


def _uniform_schedules(policy: FlowPolicy, steps: int, solver: str) -> list[Schedule]:
    """A tenth and a quarter of the evaluations recomputed."""
    key = ScheduleKey.of(policy, steps, solver)
    return [
        Schedule(
            key, (uniform(key.num_evaluations, updates),) * len(key.blocks), "uniform", {"updates": updates}
        )
        for updates in sorted({max(2, steps // 10), max(2, steps // 4)})
    ]


def _samplings(policy: FlowPolicy) -> Iterator[tuple[int, str]]:
    tuned = policy.config.tuned_num_steps
    if tuned is not None:
        yield tuned, policy.config.tuned_solver
        return
    for steps in STEPS:
        yield steps, "euler"
    for solver in ("midpoint", "heun"):
        for steps in HIGHER_ORDER_STEPS:
            yield steps, solver


def _powers_of_two(policy: FlowPolicy) -> list[int]:
    """From a shortcut model's finest step down."""
    return [2**level for level in reversed(range(policy.objective.num_levels))]


def _is_valid(policy: FlowPolicy, steps: int, solver: str) -> bool:
    try:
        policy.check_steps(steps, solver)
    except ConfigError:
        return False
    return True

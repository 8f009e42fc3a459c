"""Ways to sample a policy, with how far their actions are from its best sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowpolicy.acceleration.sampler import accelerate
from flowpolicy.acceleration.schedule import Schedule, ScheduleKey
from flowpolicy.acceleration.scheduling import uniform
from flowpolicy.errors import ConfigError
from flowpolicy.policy import FlowPolicy

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 50, 64, 100)
HIGHER_ORDER_STEPS = (1, 2, 3, 4, 5, 6, 8)
REFERENCE_STEPS = 100
CACHED_FROM = 20
"""Least K at which cache schedules are tried: below it there is little to reuse."""


@dataclass(frozen=True)
class Candidate:
    """A way to sample, whatever computes it.

    Attributes:
        num_steps: K.
        solver: of the ODE.
        schedule: of cached blocks, or None.
        nfe: network evaluations.
        error: rms to the policy's best sampling with the same noise, normalised actions; NaN until measured.
    """

    num_steps: int
    solver: str
    schedule: Schedule | None
    nfe: int
    error: float = float("nan")

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
        nfe = policy.nfe(steps, solver)
        found.append(Candidate(steps, solver, None, nfe))
        if solver == "euler" and steps >= CACHED_FROM:
            key = ScheduleKey.of(policy, steps, solver)
            for updates in sorted({max(2, steps // 10), max(2, steps // 4)}):
                steps_of_each = (uniform(nfe, updates),) * len(key.blocks)
                schedule = Schedule(key, steps_of_each, "uniform", {"updates": updates})
                found.append(Candidate(steps, solver, schedule, nfe))
    for schedule in extra:
        schedule.check(policy, schedule.key.num_steps, schedule.key.solver)
        key = schedule.key
        found.append(Candidate(key.num_steps, key.solver, schedule, key.num_evaluations))
    return sorted(found, key=lambda candidate: candidate.work)


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
        error = float((normalize(chunk) - wanted).square().mean().sqrt())
        yield Candidate(item.num_steps, item.solver, item.schedule, item.nfe, error)


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

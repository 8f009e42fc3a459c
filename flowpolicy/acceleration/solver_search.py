"""Searched solvers: the grid, and the order of each step, whose chunks are nearest to those of many steps.

For a budget of network evaluations (NFE), in the manner of Liu et al. 2023, "A Unified Sampling Framework for
Solver Searching of Diffusion Probabilistic Models", with the solvers that this package has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.acceleration.observations import (
    CALIBRATION_SEED,
    making_and_judging,
    observations_of,
    recorded_observations,
    recording_of,
)
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import task_of
from flowpolicy.flow.grids import GRIDS, Given
from flowpolicy.flow.network import field
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.flow.solvers import SOLVERS, AdamsBashforth
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.policy.searched import SearchedSampling
from flowpolicy.ranges import NonNegativeInt, PositiveInt, between
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.progress import progress
from flowpolicy.settings import Settings

REFERENCE = SamplerSpec(num_steps=128, solver="ab3", grid={"name": "uniform"})
MOST_NFE = 64
_SHORTEST, _DIGITS = 1e-3, 6  # of a step, of a time


@dataclass(frozen=True)
class SearchConfig(Settings):
    """Settings of `scripts/search_solver.py`.

    Attributes:
        checkpoint: folder of the policy.
        nfe: network evaluations of a chunk.
        demonstrations: store that the observations come from; None takes episodes of the policy in its task.
        observations: that the search judges by, each with one noise x_0.
        test_observations: others, on which errors are measured.
        episodes: that the observations come from.
        iterations: moves of the search.
        seed: environment seed of the first episode, or what chooses recorded ones; also of noises and moves.
        device: of the policy; ``auto`` takes a GPU where there is one.
        threads: CPU threads of torch; None leaves its choice.
    """

    checkpoint: str
    nfe: Annotated[int, between(2, MOST_NFE)]
    demonstrations: str | None = None
    observations: PositiveInt = 256
    test_observations: PositiveInt = 256
    episodes: PositiveInt = 16
    iterations: NonNegativeInt = 200
    seed: NonNegativeInt = CALIBRATION_SEED
    device: str = "auto"
    threads: int | None = None


class SamplingError:
    """Error of a way of sampling against many steps from the same noise, on given observations.

    Args:
        policy: a flow policy.
        observations: key -> ``(N, T_o, *shape)``, physical units.
        seed: of the noises x_0, which every way of sampling shares.
    """

    @torch.no_grad()
    def __init__(self, policy: FlowPolicy, observations: Mapping[str, Tensor], seed: int) -> None:
        normalized = policy.normalize_observations(observations)
        rows = len(next(iter(normalized.values())))
        self._policy, context = policy, policy.network.encode(normalized)
        self._velocity = field(policy.network, context, policy.objective.step_size)
        self._noise = policy.noise(rows, None, torch.Generator().manual_seed(seed))
        self._wanted = self._chunk(REFERENCE)

    @torch.no_grad()
    def __call__(self, sampling: SamplerSpec) -> float:
        """Root mean square over samples, tokens and dimensions, in normalised units."""
        return float(((self._chunk(sampling) - self._wanted) ** 2).mean().sqrt())

    def _chunk(self, sampling: SamplerSpec) -> Tensor:
        bound = self._policy.config.action_clip
        return self._policy.objective.sample(self._velocity, self._noise, sampling).clamp(-bound, bound)


def hand_made(policy: FlowPolicy, nfe: int) -> Iterator[SamplerSpec]:
    """Every solver of so many evaluations on every grid that has defaults, as far as the policy takes it."""
    grids = [name for name in GRIDS if name != Given.name]
    for (name, solver), grid in itertools.product(SOLVERS.items(), grids):
        steps = nfe // solver.nfe(1)
        if steps < 1 or solver.nfe(steps) != nfe:
            continue
        try:
            yield policy.checked(SamplerSpec(num_steps=steps, solver=name, grid={"name": grid}))
        except ConfigError:
            continue


def search(error: SamplingError, start: SamplerSpec, iterations: int, seed: int) -> tuple[SamplerSpec, float]:
    """The way of sampling with the least error that random moves from ``start`` find, and that error.

    A move stretches the steps of the grid, or changes the order of one of Adams-Bashforth's; it is kept where
    the error falls. How far steps are stretched follows the moves' success.

    Args:
        error: judges a way of sampling.
        start: where to begin.
        iterations: moves tried.
        seed: of the moves.
    """
    rng, reach = np.random.default_rng(seed), 0.3
    best = _with_times(start, [t for t, _ in start.grid_object.steps(start.steps)])
    least = error(best)
    for _ in progress(iterations if start.steps > 1 else 0, "searching"):
        moved = _moved(best, reach, rng)
        found = error(moved)
        if found < least:
            best, least = moved, found
        reach = min(reach * 1.5, 0.5) if best is moved else max(reach * 0.93, 0.003)
    return best, least


def _moved(sampling: SamplerSpec, reach: float, rng: np.random.Generator) -> SamplerSpec:
    steps, solver = sampling.steps, sampling.solver_object
    if isinstance(solver, AdamsBashforth) and rng.random() < 0.2:
        orders, step = list(solver.orders), int(rng.integers(1, steps))
        orders[step] = int(rng.integers(1, min(step + 1, 3) + 1))
        return replace(sampling, solver=AdamsBashforth(tuple(orders)).name)
    lengths = np.array([h for _, h in sampling.grid_object.steps(steps)])
    lengths *= np.exp(reach * rng.standard_normal(steps))
    lengths = np.maximum(lengths / lengths.sum(), _SHORTEST)
    return _with_times(sampling, [0.0, *np.cumsum(lengths / lengths.sum())[:-1]])


def _with_times(sampling: SamplerSpec, starts: list[float]) -> SamplerSpec:
    """The same on a grid of given times, with the order of each step spelt out."""
    times = [*(round(float(t), _DIGITS) for t in starts), 1.0]
    solver, steps = sampling.solver_object, sampling.steps
    if solver.name == "euler":
        solver = AdamsBashforth((1,))
    if isinstance(solver, AdamsBashforth):
        orders = [*solver.orders, *[solver.orders[-1]] * steps][:steps]
        solver = AdamsBashforth(tuple(min(order, k + 1) for k, order in enumerate(orders)))
    return replace(sampling, solver=solver.name, grid={"name": Given.name, "times": times})


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        found: to be saved.
        errors: of the searched way of sampling and of hand-made ones, on the observations of the search and
            on others, by name.
    """

    found: SearchedSampling
    errors: dict[str, tuple[float, float]]

    def table(self) -> str:
        """Markdown: a row for each way of sampling, least error first."""
        lines = ["| sampling | rms error where searched | on others |", "| --- | --- | --- |"]
        for name, (here, elsewhere) in sorted(self.errors.items(), key=lambda item: item[1]):
            lines.append(f"| {name} | {here:.4f} | {elsewhere:.4f} |")
        return "\n".join(lines)


def search_checkpoint(config: SearchConfig, env: Mapping[str, Any] | None = None) -> tuple[Search, str]:
    """Search for a checkpoint in its own task, or in ``env``; what was found, and the task's name.

    Raises:
        FlowPolicyError: a setting, the checkpoint or the task is not usable.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = FlowPolicy.load(config.checkpoint, resolve_device(config.device))
    policy.require_unsteered("A search for a solver")
    task = task_of(policy.spec.task, env, config.checkpoint)
    _require_any_grid(policy, config.nfe)  # before any rollout
    if config.demonstrations is not None:
        observe = partial(recorded_observations, policy, task, demonstrations=config.demonstrations)
    else:
        observe = partial(observations_of, policy, task, demonstrations=recording_of(env))
    counts = config.observations, config.test_observations
    making, judging = making_and_judging(observe, counts, config.episodes, config.seed)
    return search_sampling(policy, making, judging, config), task.name


def search_sampling(
    policy: FlowPolicy, making: Mapping[str, Tensor], judging: Mapping[str, Tensor], config: SearchConfig
) -> Search:
    """Search from the best hand-made way of sampling for each K, and measure all on other observations.

    Args:
        policy: a flow policy that takes any grid.
        making: observations that the search judges by, key -> ``(N, T_o, *shape)``, physical units.
        judging: others, that errors are measured on.
        config: what to do.

    Raises:
        ConfigError: a policy without a flow, one that is tuned, or one that takes steps of one size alone.
    """
    _require_any_grid(policy, config.nfe)
    error, judge = SamplingError(policy, making, config.seed), SamplingError(policy, judging, config.seed + 1)
    known = [(sampling, error(sampling)) for sampling in hand_made(policy, config.nfe)]
    starts = {
        sampling.steps: sampling for sampling, _ in sorted(known, key=lambda pair: -pair[1])
    }  # the best
    found = [search(error, start, config.iterations, config.seed) for start in starts.values()]
    best, least = min(found, key=lambda pair: pair[1])
    errors = {"searched": (least, judge(best))}
    errors |= {str(sampling): (here, judge(sampling)) for sampling, here in known}
    calibration = {
        "nfe": config.nfe, "rms_error": least, "rms_error_on_others": errors["searched"][1],
        "least_rms_error_of_hand_made": min(here for _, here in known), "reference": str(REFERENCE),
        "observations": config.observations, "test_observations": config.test_observations,
        "demonstrations": config.demonstrations, "episodes": config.episodes,
        "iterations": config.iterations, "seed": config.seed,
    }  # fmt: skip
    return Search(SearchedSampling(fingerprint(policy), best, calibration), errors)


def _require_any_grid(policy: FlowPolicy, nfe: int) -> None:
    """Raise a ConfigError where the policy has no flow, or not on any grid of so many evaluations."""
    policy.objective.require_flow()
    plain = SamplerSpec(num_steps=nfe, solver="euler", grid={"name": "uniform"})
    policy.checked(_with_times(plain, [k / nfe for k in range(nfe)]))

"""Schedules found by search: the least error of the final action for a given number of recomputed blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowpolicy.acceleration.caching.program import program_of
from flowpolicy.acceleration.caching.schedule import Schedule, full_schedule
from flowpolicy.acceleration.engine import BlockEngine
from flowpolicy.errors import ConfigError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.progress import progress
from flowpolicy.settings import require

Updates = tuple[tuple[int, ...], ...]


class ActionError:
    """Error of a schedule's final action against the full computation, on given observations and noises.

    Args:
        policy: the policy.
        observations: key -> ``(N, T_o, *shape)``, physical units.
        schedule: any schedule of the policy; its key says how the policy is sampled.
        seed: of the noises x_0, which every schedule shares.
    """

    def __init__(
        self, policy: FlowPolicy, observations: Mapping[str, Tensor], schedule: Schedule, seed: int = 0
    ) -> None:
        self.policy, self.key = policy, schedule.key
        self.observations = policy.check_observations(observations)
        rows = len(next(iter(self.observations.values())))
        self.noise = policy.noise(rows, None, torch.Generator().manual_seed(seed))
        sampling = policy.checked(SamplerSpec(**self.key.sampling()))
        self.engine = BlockEngine(policy, sampling, rows, full_schedule(self.key))
        self.full = self._chunk()

    def __call__(self, updates: Updates) -> float:
        """Root mean square over samples, actions and dimensions, in normalised units."""
        return self.both(updates)[0]

    def both(self, updates: Updates) -> tuple[float, float]:
        """Root mean square, and the largest."""
        self.engine.program = program_of(updates, self.key.num_evaluations)
        difference = self._chunk() - self.full
        return float((difference**2).mean().sqrt()), float(difference.abs().max())

    def _chunk(self) -> Tensor:
        return self.policy.encode(self.engine(self.observations, self.noise), self.observations)


def search(
    error: ActionError, starts: Sequence[Schedule], budget: int, *, iterations: int = 300, seed: int = 0
) -> Schedule:
    """Annealing over the sets of updates that recompute at most ``budget`` blocks in all.

    Moves take one update of one block, or of all blocks that have it, to another evaluation; or give an
    update of one block to another. The best start that keeps the budget is where it begins.

    Args:
        error: judges a set of updates.
        starts: schedules to begin from, and to compare with; too rich ones are thinned evenly.
        budget: recomputed blocks over all evaluations, at least one for each block.
        iterations: moves tried.
        seed: of the moves.

    Returns:
        The best schedule found, with its error and those of the starts in ``calibration``.
    """
    key = error.key
    require(budget >= len(key.blocks), "budget", budget, f"at least the {len(key.blocks)} blocks")
    require(iterations >= 0, "iterations", iterations, "at least 0")
    if not starts:
        raise ConfigError("The search needs a schedule to start from.")
    rng = np.random.default_rng(seed)
    judged = [(error(updates), updates) for updates in (_thinned(s.updates, budget) for s in starts)]
    current_error, current = min(judged)
    best_error, best = current_error, current
    start_error = current_error
    for index in progress(iterations, "searching"):
        proposed = _move(current, key.num_evaluations, rng)
        if proposed is None:
            continue
        found = error(proposed)
        temperature = 0.05 * start_error * (1 - index / iterations)
        if found <= current_error or rng.random() < np.exp((current_error - found) / max(temperature, 1e-12)):
            current, current_error = proposed, found
            if found < best_error:
                best, best_error = proposed, found
    calibration = {
        "rms_error": best_error,
        "rms_error_of_starts": [value for value, _ in judged],
        "observations": len(error.noise),
    }
    settings = {"budget": budget, "iterations": iterations, "seed": seed}
    return dataclasses.replace(
        starts[0], updates=best, method="searched", settings=settings, calibration=calibration
    )


def _move(updates: Updates, size: int, rng: np.random.Generator) -> Updates | None:
    """A neighbour with as many updates; None where the draw gave none."""
    blocks = [set(steps) for steps in updates]
    movable = [(b, step) for b, steps in enumerate(blocks) for step in steps if step > 0]
    if not movable or size < 2:
        return None
    block, step = movable[int(rng.integers(len(movable)))]
    kind = rng.random()
    if kind < 0.25:  # to another block
        other = int(rng.integers(len(blocks)))
        if step in blocks[other]:
            return None
        blocks[block].remove(step)
        blocks[other].add(step)
    else:
        reach = max(1, round(size * 0.1))
        target = int(np.clip(step + rng.integers(1, reach + 1) * rng.choice([-1, 1]), 1, size - 1))
        # Half the time the whole column: all blocks recomputed there.
        for which in range(len(blocks)) if kind < 0.625 else (block,):
            if step in blocks[which] and target not in blocks[which]:
                blocks[which].remove(step)
                blocks[which].add(target)
    moved = tuple(tuple(sorted(steps)) for steps in blocks)
    return None if moved == updates else moved


def _thinned(updates: Updates, budget: int) -> Updates:
    """Drop updates, one after the other from the block that has most, until the budget is kept."""
    blocks = [list(steps) for steps in updates]
    while sum(map(len, blocks)) > budget:
        fullest = max(range(len(blocks)), key=lambda b: len(blocks[b]))
        steps = blocks[fullest]
        # The one whose neighbours are closest: the shortest gap closes.
        gaps = [
            steps[i + 1] - steps[i - 1] if i + 1 < len(steps) else 2 * (steps[i] - steps[i - 1])
            for i in range(1, len(steps))
        ]
        del steps[1 + int(np.argmin(gaps))]
    return tuple(tuple(steps) for steps in blocks)

"""Cache schedules from a policy and observations, with their cost and action error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey
from flowpolicy.acceleration.caching.scheduling import (
    Updates,
    adaptive_caching,
    bubbling_union,
    consecutive_caching,
    uniform,
)
from flowpolicy.acceleration.caching.search import ActionError, search
from flowpolicy.acceleration.caching.similarity import MINIMUM_OBSERVATIONS, Similarity, measure_similarity
from flowpolicy.acceleration.observations import (
    CALIBRATION_SEED,
    making_and_judging,
    observations_of,
    recording_of,
    rows_of,
)
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.storage import atomic_file
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.ranges import NonNegativeInt, PositiveInt, at_least, one_of
from flowpolicy.runs.device import resolve_device
from flowpolicy.settings import Settings, require

METHODS = ("uniform", "acs", "acs+bua", "consecutive", "searched")


@dataclass(frozen=True)
class CalibrationConfig(Settings):
    """Settings of `scripts/calibrate_cache.py`.

    Attributes:
        checkpoint: folder of the policy.
        num_steps: K; None takes the policy's own.
        solver: ODE solver, or the file of a searched one; None takes the policy's own.
        grid: ``name`` and settings of the grid of flow times; None takes the policy's own.
        updates: S, evaluations at which each block is recomputed.
        bubbles: n, blocks that BUA gives a union.
        method: which schedule becomes ``schedule.json``: one of the methods, or ``best``, the one with
            the least error among those that recompute no more than ``acs+bua``.
        observations: that schedules are made from.
        noise_seeds: noises x_0 for each of them.
        test_observations: others, on which the errors are measured.
        episodes: that the observations come from.
        search_iterations: moves of the search; 0 leaves it out.
        search_observations: on which the search judges a move.
        seed: environment seed of the first episode, and of the noises.
        device: of the policy; ``auto`` takes a GPU where there is one.
        threads: CPU threads of torch; None leaves its choice.
    """

    checkpoint: str
    num_steps: int | None = None
    solver: str | None = None
    grid: dict[str, Any] | None = None
    updates: PositiveInt = 10
    bubbles: NonNegativeInt = 5
    method: Annotated[str, one_of(("best", *METHODS))] = "best"
    observations: Annotated[int, at_least(MINIMUM_OBSERVATIONS)] = 128
    noise_seeds: PositiveInt = 4
    test_observations: PositiveInt = 64
    episodes: PositiveInt = 16
    search_iterations: NonNegativeInt = 400
    search_observations: PositiveInt = 32
    seed: NonNegativeInt = CALIBRATION_SEED
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        schedules: by method; each one's ``calibration`` holds ``rms_error`` and ``max_error`` of the
            final action in normalised units, on observations it was not made from.
        similarity: what ACS and BUA were made from.
        fewer_steps: error of plain sampling with S steps, the control; None where the policy cannot take
            S steps.
        chosen: the method of the schedule to use.
    """

    schedules: dict[str, Schedule]
    similarity: Similarity
    fewer_steps: float | None
    chosen: str

    def table(self) -> str:
        """Markdown: a row a method."""
        lines = [
            "| schedule | f, blocks recomputed | rms error | largest error |",
            "| --- | --- | --- | --- |",
        ]
        for name, schedule in self.schedules.items():
            rms, most = schedule.calibration["rms_error"], schedule.calibration["max_error"]
            mark = " (chosen)" if name == self.chosen else ""
            lines.append(f"| {name}{mark} | {schedule.share:.3f} | {rms:.4f} | {most:.3f} |")
        if self.fewer_steps is not None:
            some = next(iter(self.schedules.values()))
            count = some.settings["updates"]
            share = count / some.key.num_steps
            lines.append(f"| no cache, {count} steps | {share:.3f} | {self.fewer_steps:.4f} | |")
        return "\n".join(lines)

    def metrics(self) -> dict[str, Any]:
        """Errors and shares by method, for ``summary.json``."""
        return {
            "chosen": self.chosen,
            "no_cache_fewer_steps_rms_error": self.fewer_steps,
            **{
                name: {"share": schedule.share, **schedule.calibration, **schedule.settings}
                for name, schedule in self.schedules.items()
            },
        }

    def write(self, folder: Path) -> list[Path]:
        """Write ``schedule.json`` (the chosen one), one file a method, both pictures and the matrices."""
        from flowpolicy.plots.caching import plot_schedules, plot_similarity

        chosen = self.schedules[self.chosen]
        files = [chosen.save(folder / "schedule.json")]
        files += [
            schedule.save(folder / f"schedule-{name}.json") for name, schedule in self.schedules.items()
        ]
        title = f"K = {chosen.key.num_steps}, S = {chosen.settings['updates']}"
        files.append(plot_schedules(self.schedules, folder / "schedules.png", title=title))
        files.append(
            plot_similarity(self.similarity, chosen.key.blocks, folder / "similarity.png", title=title)
        )
        with atomic_file(folder / "similarity.npz") as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream, cosine=self.similarity.cosine.astype(np.float32),
                spread=self.similarity.spread.astype(np.float32), error=self.similarity.error,
            )  # fmt: skip
        return [*files, folder / "similarity.npz"]


def calibrate_checkpoint(
    config: CalibrationConfig, env: Mapping[str, Any] | None = None
) -> tuple[Calibrated, str]:
    """Calibrate a checkpoint in its own task, or in ``env``; what was found, and the task's name.

    Raises:
        FlowPolicyError: a setting, the checkpoint or the task is not usable.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = FlowPolicy.load(config.checkpoint, resolve_device(config.device))
    policy.require_unsteered("Calibration")
    task = task_of(policy.spec.task, env, config.checkpoint)
    _sampling(policy, config)  # a setting that cannot be is refused before any rollout
    observe = partial(observations_of, policy, task, demonstrations=recording_of(env))
    counts = config.observations, config.test_observations
    making, judging = making_and_judging(observe, counts, config.episodes, config.seed)
    return calibrate(policy, making, judging, config), task.name


def calibrate(
    policy: FlowPolicy, making: Mapping[str, Tensor], judging: Mapping[str, Tensor], config: CalibrationConfig
) -> Calibrated:
    """Make schedules by every method, and measure the error of their actions.

    Args:
        policy: a flow policy.
        making: observations that schedules are made from, key -> ``(N, T_o, *shape)`` in physical units;
            see :func:`~flowpolicy.acceleration.observations.observations_of`.
        judging: others, that errors are measured on.
        config: what to do.

    Raises:
        ConfigError: a policy without steps to cache between, or more updates than evaluations.
        DataError: too few observations.
        FlowPolicyError: observations with NaN.
    """
    sampling = _sampling(policy, config)
    key = ScheduleKey.of(policy, sampling)
    similarity = measure_similarity(
        policy, making, sampling, noise_seeds=config.noise_seeds, seed=config.seed
    )
    count = config.updates
    about = {
        "observations": similarity.observations,
        "noise_seeds": similarity.noise_seeds,
        "episodes": config.episodes,
        "seed": config.seed,
        "similarity_spread": float(similarity.spread.mean()),
    }

    schedules = caching_schedules(key, similarity, count, config.bubbles, about)
    if config.search_iterations:
        rows = torch.linspace(0, similarity.observations - 1, config.search_observations).round().long()
        error = ActionError(policy, rows_of(making, rows), schedules["uniform"], config.seed)
        # Blocks recomputed together never see each other's stale outputs: one common placement to start from.
        together = (adaptive_caching(similarity.cosine.mean(0), count),) * len(key.blocks)
        common = Schedule(key, together, "common")
        found = search(
            error, [*schedules.values(), common], count * len(key.blocks),
            iterations=config.search_iterations, seed=config.seed,
        )  # fmt: skip
        schedules["searched"] = dataclasses.replace(
            found, settings={"updates": count, **found.settings}, calibration=dict(about)
        )
    judge = ActionError(policy, judging, schedules["uniform"], config.seed + 1)
    for schedule in schedules.values():
        rms, largest = judge.both(schedule.updates)
        schedule.calibration.update(rms_error=rms, max_error=largest)
    return Calibrated(
        schedules,
        similarity,
        _fewer_steps(policy, judge, replace(sampling, num_steps=count)),
        _chosen(schedules, config.method),
    )


def _sampling(policy: FlowPolicy, config: CalibrationConfig) -> SamplerSpec:
    """How the policy is to be sampled, with as many evaluations as updates and more than one."""
    sampling = policy.checked(SamplerSpec(num_steps=config.num_steps, solver=config.solver, grid=config.grid))
    size = ScheduleKey.of(policy, sampling).num_evaluations
    if size < 2:
        raise ConfigError(
            f"num_steps is {sampling.num_steps}; there is nothing to reuse in a single evaluation."
        )
    require(config.updates <= size, "updates", config.updates, f"at most the {size} evaluations")
    return sampling


def caching_schedules(
    key: ScheduleKey, similarity: Similarity, updates: int, bubbles: int, about: Mapping[str, Any]
) -> dict[str, Schedule]:
    """The schedules that follow from the similarities of blocks, and the uniform control, by method.

    Args:
        key: what they are for.
        similarity: of the key's blocks at its evaluations.
        updates: S.
        bubbles: n, blocks that BUA gives a union; at most all.
        about: goes into each one's ``calibration``.
    """
    layers, kinds = zip(*(block.split(".") for block in key.blocks), strict=True)
    bubbles = min(bubbles, len(kinds))

    def made(method: str, found: tuple[Updates, ...], **more: int) -> Schedule:
        return Schedule(key, found, method, {"updates": updates, **more}, dict(about))

    plain = tuple(adaptive_caching(matrix, updates) for matrix in similarity.cosine)
    union = bubbling_union(plain, kinds, [int(layer) for layer in layers], similarity.error.tolist(), bubbles)
    return {
        "uniform": made("uniform", (uniform(key.num_evaluations, updates),) * len(kinds)),
        "acs": made("acs", plain),
        "acs+bua": made("acs+bua", union, bubbles=bubbles),
        "consecutive": made("consecutive", tuple(consecutive_caching(m, updates) for m in similarity.cosine)),
    }


def _fewer_steps(policy: FlowPolicy, judge: ActionError, sampling: SamplerSpec) -> float | None:
    try:
        policy.checked(sampling)
    except ConfigError:
        return None
    chunk = policy.act(judge.observations, sampler=sampling, noise=judge.noise)
    return float(((policy.encode(chunk, judge.observations) - judge.full) ** 2).mean().sqrt())


def _chosen(schedules: Mapping[str, Schedule], method: str) -> str:
    if method != "best":
        if method not in schedules:
            raise ConfigError(f"method is '{method}', which search_iterations=0 leaves out.")
        return method
    most = schedules["acs+bua"].share
    allowed = {name: s.calibration["rms_error"] for name, s in schedules.items() if s.share <= most + 1e-9}
    return min(allowed, key=lambda name: allowed[name])

"""From a deadline to a plan: enumerate, measure, prune, try in episodes with the measured latency, choose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.choosing.candidates import (
    Candidate,
    candidates_of,
    searched_schedules,
    with_errors,
)
from flowpolicy.acceleration.choosing.config import PlanConfig
from flowpolicy.acceleration.choosing.measuring import NOT_HERE, Measured, measure
from flowpolicy.acceleration.choosing.plan import DeploymentPlan, MeasuredSampler, hardware
from flowpolicy.acceleration.observations import CALIBRATION_SEED, observations_of, recording_of
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.delayed import DelayedResult, run_delayed
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval, percentiles
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.rounding import three_digits
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.progress import progress

WAITED_SHARE = 0.3
"""Of a control step: a chunk that comes within it is waited for; see ``ControlConfig.wait_share``."""


@dataclass(frozen=True)
class Planning:
    """The result of :func:`plan_checkpoint`.

    Attributes:
        config: what was asked.
        task: in which.
        measured: all candidates, least work first.
        chosen: the one to use.
        fast: a faster one for gaps, or None.
        reason: why, in words.
        plan: to be saved.
    """

    config: PlanConfig
    task: Task
    measured: list[Measured]
    chosen: Measured
    fast: Measured | None
    reason: str
    plan: DeploymentPlan

    def table(self) -> str:
        """Markdown: those that were timed, the others with what was against them, then the reason."""
        metric = self.task.metric
        lines = [
            f"| sampler | backend | NFE x f | p50 ms | {100 * self.config.quantile:g}% below ms "
            f"| action error | {metric} with this latency | |",
            "|" + " --- |" * 8,
        ]
        for item in self.measured:
            calls = item.all_calls()
            if not len(calls):
                continue
            mark = "**chosen**" if item is self.chosen else "fast" if item is self.fast else item.verdict
            found = "" if item.rollouts is None else _span(metric_of(item.rollouts, metric))
            lines.append(
                f"| {item.candidate.name} | {item.backend} | {item.candidate.work:.1f} "
                f"| {np.median(calls):.3f} | {item.bound:.3f} | {item.candidate.error:.4f} "
                f"| {found} | {mark} |"
            )
        return "\n".join([*lines, "", *_left_out(self.measured), "", self.reason])

    def write(self, folder: Path) -> list[Path]:
        """Write ``plan.json``, the schedules it needs, and ``plan.png``."""
        from flowpolicy.plots.samplers import plot_planning

        files = []
        for item in (self.chosen, self.fast):
            if item is not None and item.candidate.schedule is not None:
                files.append(item.candidate.schedule.save(folder / schedule_file(item)))
        files.append(self.plan.save(folder / "plan.json"))
        files.append(plot_planning(self.measured, self.chosen, self.config, folder / "plan.png"))
        return files


def plan_checkpoint(config: PlanConfig, env: Mapping[str, Any] | None = None) -> Planning:
    """Find the sampler that keeps the deadline and loses the least.

    Raises:
        FlowPolicyError: nothing keeps both bounds; the sentence names the nearest miss.
    """
    torch.set_num_threads(config.threads)
    policy = FlowPolicy.load(config.checkpoint, resolve_device(config.device))
    policy.require_unsteered("Planning")
    task = task_of(policy.spec.task, env, config.checkpoint)
    observe = partial(observations_of, policy, task, demonstrations=recording_of(env))
    recorded = observe(config.observations, episodes=16, seed=CALIBRATION_SEED + 2000)
    schedules = [Schedule.load(path) for path in config.schedules]
    if config.search_iterations and any(item.schedule for item in candidates_of(policy)):
        # On other episodes than those they are judged on.
        making = observe(16, episodes=4, seed=CALIBRATION_SEED + 3000)
        schedules += searched_schedules(policy, making, config.search_iterations, config.seed)
    candidates = candidates_of(policy, schedules, [SamplerSpec(solver=path) for path in config.solvers])
    judged = list(with_errors(policy, candidates, recorded, config.seed))
    kept, beaten = unbeaten(judged, config.max_action_error)
    measured = [*measure(policy, kept, recorded, config), *beaten]
    in_time = [item for item in measured if item.verdict == "in time"]
    if not in_time:
        raise FlowPolicyError(_nearest_miss(measured, config))
    tried = front_of(in_time, config.front)
    if task.env_id is None:
        most_exact = "It is the most exact one in time; the task has no simulator to try others in."
        chosen, reason = tried[0], _reason(tried[0], config, most_exact)
    else:
        for item in progress(tried, "episodes"):
            item.rollouts = _rollouts(policy, task, item, config)
        chosen, reason = choose_among(tried, task, config)
    faster = [item for item in in_time if item.bound < 0.7 * chosen.bound]
    fast = min(faster, key=lambda item: item.bound, default=None)
    plan = DeploymentPlan(
        fingerprint(policy), hardware(config.threads), config.period_ms, config.quantile,
        config.max_action_error, _planned(chosen), None if fast is None else _planned(fast),
        str(policy.device), config.threads, task.execute_horizon,
        _outcome(chosen, task, config), reason,
        int(np.quantile(delays_of(chosen, task), config.quantile, method="higher")),
    )  # fmt: skip
    return Planning(config, task, measured, chosen, fast, reason, plan)


def unbeaten(judged: Sequence[Candidate], max_action_error: float) -> tuple[list[Candidate], list[Measured]]:
    """Those that may be the best one in some backend, and the others, each with what beats it.

    Those that are too inexact beat nothing, and are among the first: what measures them says so.
    """
    exact = [item for item in judged if item.error_bound <= max_action_error]
    kept, beaten = [], []
    for item in judged:
        better = [other for other in exact if other.beats(item)] if item in exact else []
        if better:
            name = min(better, key=lambda other: (other.error, other.work)).name
            beaten.append(Measured(item, "any", verdict=f"beaten by {name}"))
        else:
            kept.append(item)
    return kept, beaten


def front_of(items: Sequence[Measured], most: int = 4) -> list[Measured]:
    """Those that no other one beats in both latency and error, most exact first; ``most`` of them."""
    front: list[Measured] = []
    for item in sorted(items, key=lambda item: (item.candidate.error, item.bound)):
        if all(item.bound < other.bound for other in front):
            front.append(item)
    if len(front) > most:  # both ends, and what lies evenly between them
        front = [front[i] for i in np.linspace(0, len(front) - 1, most).round().astype(int)]
    return front


def choose_among(tried: Sequence[Measured], task: Task, config: PlanConfig) -> tuple[Measured, str]:
    """The most exact of those whose episodes are not worse than the best one's, by paired intervals."""
    values = [metric_of(item.rollouts, task.metric) for item in tried if item.rollouts is not None]
    best = int(np.argmax([v.mean() for v in values]))
    equal = [
        index
        for index, value in enumerate(values)
        if index == best or paired_difference_interval(value, values[best])[1] >= 0
    ]
    chosen = min(equal, key=lambda index: (tried[index].candidate.error, tried[index].bound))
    item = tried[chosen]
    compared = "No other sampler in time is both faster and as exact."
    if len(tried) > 1:
        compared = (
            f"Of {len(tried)} samplers that no other beats in both latency and error it is the most exact of "
            f"the {len(equal)} whose {task.metric}, over {config.episodes} paired episodes with their own "
            "latency injected, is not below the best one's."
        )
    return item, _reason(item, config, compared)


def _reason(item: Measured, config: PlanConfig, compared: str) -> str:
    return (
        f"{item.candidate.name} in {item.backend}: {100 * config.quantile:g}% of its calls end within "
        f"{item.bound:.3f} ms of the {config.period_ms:g} ms, and its action error is "
        f"{item.candidate.error:.4f} (below {item.candidate.error_bound:.4f} at 95% confidence, largest "
        f"{item.candidate.largest_error:.3f}) of at most {config.max_action_error:g}. {compared}"
    )


def metric_of(result: DelayedResult, metric: str) -> NDArray[np.float64]:
    """One number for each episode: what the task is judged by."""
    found = {"return": result.returns, "success": result.success, "score": result.score}[metric]
    return np.asarray(result.returns if found is None else found, dtype=np.float64)


def schedule_file(item: Measured) -> str:
    """Name of a candidate's schedule beside the plan."""
    candidate = item.candidate
    method = "" if candidate.schedule is None else candidate.schedule.method
    return f"schedule-K{candidate.sampling.num_steps}-{method}-{candidate.work:.0f}.json"


def delays_of(item: Measured, task: Task) -> NDArray[np.int64]:
    """Whole control steps by which each measured call's chunk would have come late."""
    step = 1e3 / task.control_hz
    calls = item.all_calls()
    return np.where(calls <= WAITED_SHARE * step, 0, np.ceil(calls / step)).astype(np.int64)


def _rollouts(policy: FlowPolicy, task: Task, item: Measured, config: PlanConfig) -> DelayedResult:
    """Episodes in which every chunk comes as late as a measured call's would have."""
    candidate = item.candidate
    sampler = build_sampler(
        policy, candidate.sampling, batch_size=25, schedule=candidate.schedule, backend=item.backend
    )
    return run_delayed(
        sampler, task, strategy=config.strategy, delay=delays_of(item, task),
        safe_action=config.safe_action or task.safe_action or "hold", episodes=config.episodes,
        seed=config.seed, num_envs=min(50, config.episodes),
    )  # fmt: skip


def _outcome(chosen: Measured, task: Task, config: PlanConfig) -> dict[str, Any]:
    """What the episodes of the chosen one came to; nothing where none were run."""
    if chosen.rollouts is None:
        return {}
    values = metric_of(chosen.rollouts, task.metric)
    figures = {"mean": float(values.mean()), "ci95": list(mean_interval(values)), "episodes": len(values)}
    return {"metric": task.metric, **figures, "strategy": config.strategy}


def _planned(item: Measured) -> MeasuredSampler:
    candidate = item.candidate
    schedule = None if candidate.schedule is None else schedule_file(item)
    return MeasuredSampler(
        replace(candidate.sampling, backend=item.backend, schedule=schedule), candidate.share, candidate.nfe,
        percentiles(item.all_calls()) | {"bound": item.bound}, candidate.error, candidate.error_bound,
        candidate.largest_error,
    )  # fmt: skip


def _nearest_miss(measured: Sequence[Measured], config: PlanConfig) -> str:
    timed = [item for item in measured if math.isfinite(item.bound)]
    missing = [item.verdict for item in measured if item.verdict.startswith(NOT_HERE)]
    if missing and not timed:
        return f"None of the backends runs here; {missing[0]}"
    if not timed:
        least = min(item.candidate.error_bound for item in measured)
        return (
            f"No sampler has an action error that is surely at most {config.max_action_error:g}; "
            f"the least is {least:.4f}, so raise max_action_error to that."
        )
    nearest = min(timed, key=lambda item: item.bound)
    return (
        f"No sampler keeps {config.period_ms:g} ms at an action error of at most "
        f"{config.max_action_error:g}; the nearest is {nearest.candidate.name} in {nearest.backend}, "
        f"which needs period_ms={nearest.bound / (1 - config.margin):.3g}: raise one of the two."
    )


def _left_out(measured: Sequence[Measured]) -> list[str]:
    """A line for each thing that was against candidates that were not timed."""
    lines: dict[str, list[str]] = {}
    for item in measured:
        if item.milliseconds:
            continue
        candidate, verdict = item.candidate, item.verdict
        if verdict == "too inexact":
            entry = f"{candidate.name} ({candidate.error:.3f}, bound {candidate.error_bound:.3f})"
        elif verdict.startswith("beaten by"):
            verdict, entry = "no faster and no more exact than another one", f"{candidate.name} ({verdict})"
        elif verdict.startswith(NOT_HERE):
            entry = f"{item.backend} ({verdict.removeprefix(f'{NOT_HERE}: ').rstrip('.')})"
            verdict = NOT_HERE
        else:
            entry = f"{candidate.name} in {item.backend}"
        entries = lines.setdefault(verdict, [])
        if entry not in entries:  # the same for all backends, or all candidates
            entries.append(entry)
    return [f"Not timed, {verdict}: {'; '.join(entries)}." for verdict, entries in lines.items()]


def _span(values: NDArray[np.float64]) -> str:
    low, high = mean_interval(values)
    return f"{three_digits(values.mean())} [{three_digits(low)}, {three_digits(high)}]"

"""The same policy at several numbers of integration steps: evaluate, print, write, plot."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flowpolicy.data.versions import version_warning
from flowpolicy.evaluation.parallel import evaluate_checkpoint, load_policy
from flowpolicy.evaluation.result import METRICS, EvaluationResult
from flowpolicy.evaluation.rollout import EVALUATION_SEED
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.ranges import Episodes, NonNegativeInt, PositiveInt
from flowpolicy.rounding import three_digits
from flowpolicy.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Settings of `scripts/evaluate.py`.

    Attributes:
        checkpoint: folder of the policy.
        num_steps: integration steps K; None takes the policy's own.
        k_sweep: further K to evaluate on the same seeds.
        solver: ODE solver, or the file of a searched one; None takes the policy's own.
        grid: ``name`` and settings of the grid of flow times; None takes the policy's own.
        episodes: episodes for each K.
        seed: environment seed of the first episode.
        num_envs: environments side by side in each process.
        workers: processes.
        zero_noise: x_0 = 0 in place of a draw from N(0, I).
        video: episodes to record at ``num_steps``; true records one, false none.
        force: evaluate a K that a fine-tuned checkpoint was not tuned for.
        device: of the policy; ``auto`` takes a GPU where there is one.
        threads: CPU threads of torch; None leaves its choice.
    """

    checkpoint: str
    num_steps: PositiveInt | None = None
    k_sweep: tuple[PositiveInt, ...] = ()
    solver: str | None = None
    grid: dict[str, Any] | None = None
    episodes: PositiveInt = 100
    seed: NonNegativeInt = EVALUATION_SEED
    num_envs: PositiveInt = 20
    workers: PositiveInt = 1
    zero_noise: bool = False
    video: Episodes = 0
    force: bool = False
    device: str = "auto"
    threads: PositiveInt | None = None


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_sweep` found.

    Attributes:
        task: the task that was run.
        policy: the policy's name, with ``zero noise`` where x_0 was 0, and with T_e where it is not its own.
        num_steps: the K of the main row.
        results: K -> result.
        demo_mean: the demonstrations' mean return, where the checkpoint names one.
        train_steps: optimiser steps of the checkpoint, 0 where it does not say.
    """

    task: Task
    policy: str
    num_steps: int
    results: dict[int, EvaluationResult]
    demo_mean: float | None = None
    train_steps: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per K in rising order: ``num_steps``, ``execute_horizon`` and the metrics."""
        horizon = self.task.execute_horizon
        return [
            {"num_steps": steps, "execute_horizon": horizon, **result.metrics()}
            for steps, result in sorted(self.results.items())
        ]

    def metrics(self) -> dict[str, Any]:
        """The main row's figures, ``demo_return_mean``, and the whole sweep under ``k_sweep``."""
        rows = self.rows()
        main = next(row for row in rows if row["num_steps"] == self.num_steps)
        return {**main, "demo_return_mean": self.demo_mean, "k_sweep": rows if len(rows) > 1 else None}

    def table(self) -> str:
        """Text for a terminal: K, T_e, NFE, milliseconds, return, success, score; then a line per task."""
        by_task = self.metrics()["by_task"]
        table = format_table(self.rows())
        return table if by_task is None else f"{table}\n\n{format_tasks(by_task)}"

    def write(self, run_dir: Path) -> list[Path]:
        """Write one CSV of episodes per K, the histogram of returns, and the sweep's plot."""
        from flowpolicy.plots.evaluation import plot_k_sweep, plot_returns, plot_tasks

        task_and_policy = f"{self.task.name}, {self.policy}, T_e = {self.task.execute_horizon}"
        title = f"{task_and_policy}, K = {self.num_steps}"
        written = [
            result.write_csv(run_dir / f"episodes_K{steps}.csv") for steps, result in self.results.items()
        ]
        main = self.results[self.num_steps]
        metrics = main.metrics()
        written.append(
            plot_returns(
                main.returns,
                run_dir / "returns.png",
                demo_mean=self.demo_mean,
                interval=metrics["return_ci95"],
                title=f"{title}: return, mean with 95% interval",
            )
        )
        if metrics["by_task"] is not None and main.success is not None:
            written.append(plot_tasks(metrics["by_task"], run_dir / "tasks.png", title=title))
        if len(self.results) > 1:
            metric = self.task.metric if metrics[METRICS[self.task.metric][0]] is not None else "return"
            demo = self.demo_mean if metric == "return" else None
            path = run_dir / "k_sweep.png"
            written.append(
                plot_k_sweep(self.rows(), path, title=task_and_policy, metric=metric, demo_mean=demo)
            )
        return written


def evaluate_sweep(
    config: EvaluationConfig, run_dir: Path, env: Mapping[str, Any] | None = None
) -> Evaluation:
    """Evaluate a checkpoint at ``num_steps`` and at every K of ``k_sweep``, on the same seeds and noise.

    Args:
        config: the settings.
        run_dir: takes the video.
        env: the task's settings; None takes the task that the checkpoint names.

    Raises:
        CheckpointError: when the checkpoint cannot be read.
        ConfigError: when it names no task, or has not the K or solver asked for.
        TaskError: when the task cannot be made or does not fit the policy.
    """
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    policy: Any = load_policy(config.checkpoint, config.device)
    task = task_of(policy.spec.task, env, config.checkpoint)
    task.simulator()
    warning = version_warning(policy.spec.metadata)
    if warning is not None:
        logger.warning("%s: %s", config.checkpoint, warning)
    asked = SamplerSpec(num_steps=config.num_steps, solver=config.solver, grid=config.grid)
    wished = [asked, *(dataclasses.replace(asked, num_steps=value) for value in config.k_sweep)]
    # Before any rollout: a sweep must not end in a refusal after an hour.
    samplings = [policy.checked(wish, allow_any_steps=config.force) for wish in wished]
    main = samplings[0].steps
    results = {}
    for value, sampling in sorted({sampling.steps: sampling for sampling in samplings}.items()):
        recorded = config.video if value == main else 0
        results[value] = evaluate_checkpoint(
            config.checkpoint,
            task,
            load=functools.partial(_sampled, device=config.device, sampling=sampling),
            episodes=config.episodes,
            workers=config.workers,
            seed=config.seed,
            num_envs=config.num_envs,
            zero_noise=config.zero_noise,
            record=recorded,
            video=run_dir / "video.mp4" if recorded else None,
        )
    other = ["zero noise"] if config.zero_noise else []
    if task.execute_horizon != policy.spec.execute_horizon:
        other.append(f"T_e = {task.execute_horizon} and not {policy.spec.execute_horizon}")
    name = f"{policy.spec.name} ({', '.join(other)})" if other else policy.spec.name
    demo = _number(policy.spec.metadata.get("demo_return_mean"))
    return Evaluation(task, name, main, results, demo, int(_number(policy.spec.metadata.get("steps")) or 0))


def _sampled(checkpoint: str, device: str, sampling: SamplerSpec) -> ChunkPolicy:
    """The policy with another way of sampling as its own."""
    policy: Any = load_policy(checkpoint, device)
    policy.sampling = sampling
    return cast("ChunkPolicy", policy)


def _number(noted: Any) -> float | None:
    """What a checkpoint notes of itself, where that is a number that can be meant."""
    is_number = isinstance(noted, (int, float)) and not isinstance(noted, bool) and abs(noted) < 1e15
    return noted if is_number else None


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of metrics as aligned text, one line per K; columns that no row has are left out."""
    cost = (("K", "num_steps", "d"), ("T_e", "execute_horizon", "d"), ("NFE", "nfe", "d"))
    return _table(rows, (*cost, ("ms/chunk", "ms_per_chunk", ".2f"), *_PERFORMANCE))


def format_tasks(by_task: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of each task, and the mean of their success rates, as aligned text."""
    rows: list[Mapping[str, Any]] = [{"task": name, **row} for name, row in by_task.items()]
    rates = [row["success_rate"] for row in rows if row["success_rate"] is not None]
    if rates:
        rows.append({"task": "mean", "success_rate": sum(rates) / len(rates)})
    return _table(rows, (("task", "task", "s"), *_PERFORMANCE))


_PERFORMANCE = (
    ("return", "return_mean", ""), ("95% interval", "return_ci95", ""),
    ("success", "success_rate", ".3f"), ("95% interval", "success_ci95", ".3f"),
    ("score", "score_mean", ".3f"), ("95% interval", "score_ci95", ".3f"), ("episodes", "episodes", "d"),
)  # fmt: skip
"""Columns: their header, the metric, and its format; none where the metric may be of any size."""


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    shown = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [[header for header, _, _ in shown]]
    lines += [[_cell(row.get(key), form) for _, key, form in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _cell(value: Any, form: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{_cell(value[0], form)}, {_cell(value[1], form)}]"
    if value is None:
        return ""
    return f"{value:{form}}" if form else three_digits(value)

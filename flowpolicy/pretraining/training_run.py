"""What every training run has: settings, a folder, a trainer, an evaluation at the end, plots, a summary."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowpolicy.data.command_source import learnt_steps
from flowpolicy.data.mixture import datasets, read_stores
from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.evaluation.task import Task
from flowpolicy.flow.objective import Loss
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.config import DataConfig, TrainConfig
from flowpolicy.pretraining.judging import Judge, OpenLoop, Rollouts
from flowpolicy.pretraining.state import STATE_FOLDER
from flowpolicy.pretraining.stores import split_episodes
from flowpolicy.pretraining.trainer import CHECKPOINT, Trainer
from flowpolicy.ranges import Episodes, NonNegativeInt
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.loggers import build_loggers, read_metrics
from flowpolicy.runs.run_folder import RunFolder, comparable_settings
from flowpolicy.settings import Settings

logger = logging.getLogger(__name__)
SUMMARY = "summary.json"
_REPORTING = (
    "resume", "device", "video", "data.image_memory_gb", "train.log_every", "train.evaluate_every",
    "train.evaluate_episodes", "train.final_episodes", "train.num_envs", "train.save_every", "train.loggers",
    "train.wandb", "train.threads", "train.validate_every", "env.native",
)  # fmt: skip
"""Settings that a resumed run may change: where images lie, and where and how often it reports."""


@dataclass(frozen=True, kw_only=True)
class TrainingRunConfig(Settings):
    """What every training run depends on.

    Attributes:
        env: the task's settings, and its ``demonstrations``.
        data: which demonstrations and how they are cut.
        train: optimisation, evaluation and bookkeeping.
        seed: of weights, batches, noise and the choice of held-out episodes.
        device: ``auto`` takes a GPU where there is one.
        resume: continue the run in ``run_dir``.
        video: episodes of the final evaluation to record; true records one, false none.
        init: checkpoint whose weights training starts from.
    """

    env: dict[str, Any]
    data: DataConfig
    train: TrainConfig
    seed: NonNegativeInt = 0
    device: str = "auto"
    resume: bool = False
    video: Episodes = True
    init: str | None = None


@dataclass(frozen=True)
class TrainingRun:
    """A run in its folder, among the processes that share it.

    Attributes:
        config: its settings.
        folder: where it leaves everything.
        group: the processes.
        command: that started it.
        started: when, in seconds of ``time.perf_counter``.
    """

    config: TrainingRunConfig
    folder: RunFolder
    group: Processes
    command: str
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        self.folder.continues(resume=self.config.resume)

    def train(
        self,
        policy: FlowPolicy,
        training: ChunkSampler,
        validation: ChunkSampler | None,
        judge: Judge,
        task: Task,
        loss: Loss | None = None,
    ) -> tuple[FlowPolicy, dict[str, Any]] | None:
        """Begin or continue, train to the end and evaluate; the policy and the figures of the summary, on the
        first process alone.
        """
        config, group, run_dir = self.config, self.group, self.folder.path
        settings = comparable_settings(config, _REPORTING)
        if group.is_first:
            self.folder.begin(settings)
            judge.announce()
        trainer = Trainer(
            policy, training, validation, config.train,
            run_dir=run_dir, seed=config.seed, processes=group, settings=settings,
            evaluate=judge.on_the_way, loss=loss,
        )  # fmt: skip
        if config.resume and trainer.resume():
            logger.info("Continuing %s at step %d.", run_dir, trainer.state.step)
        if group.is_first:
            trainer.loggers = build_loggers(
                config.train.loggers, run_dir, settings, config.train.wandb, trainer.state.step
            )
        result = trainer.run()
        if not group.is_first:
            return None
        if not (run_dir / CHECKPOINT).exists():  # lost from a finished run: its state has the weights
            trainer.save()
        metrics: dict[str, Any] = {
            "demo_return_mean": policy.spec.metadata.get("demo_return_mean"),
            "lost_actions": policy.spec.metadata.get("lost_actions"),
            "train_seconds": trainer.state.seconds + time.perf_counter() - self.started,
        }
        if config.train.final_episodes:
            found, scalars = judge.at_the_end(result, run_dir)
            metrics.update(found)
            trainer.loggers.log(trainer.state.step, scalars)
        trainer.loggers.close()
        self._plot(task, policy.spec.name, metrics)
        return result, metrics

    def _plot(self, task: Task, policy: str, metrics: dict[str, Any]) -> None:
        """Draw the curves, and put the last validation figures among the ``metrics``."""
        from flowpolicy.plots.learning import plot_learning_curves

        history = read_metrics(self.folder.path / "metrics.csv")
        for row in history:
            metrics.update({key: value for key, value in row.items() if key.startswith("validation/")})
        plot_learning_curves(
            history,
            self.folder.path / "curves.png",
            title=f"{task.name}, {policy}",
            metric=task.metric,
            demo_mean=metrics["demo_return_mean"] if task.metric == "return" else None,
        )

    def summarize(self, policy: FlowPolicy, task: Task, metrics: dict[str, Any]) -> Path:
        """Write ``summary.json``, which makes the run a finished one; its path."""
        run_dir = self.folder.path
        return write_summary(
            run_dir, task=task.name, policy=policy.spec.name, seed=self.config.seed,
            steps=self.config.train.steps, wall_seconds=time.perf_counter() - self.started, metrics=metrics,
            checkpoint=str(run_dir / CHECKPOINT), command=self.command, parameters=policy.num_parameters(),
            execute_horizon=task.execute_horizon,
        )  # fmt: skip


def judge_of(config: TrainingRunConfig, task: Task, policy: FlowPolicy, demos: Demonstrations) -> Judge:
    """Rollouts in the task's simulator, or where it has none recorded episodes that are held out."""
    if task.env_id is not None:
        return Rollouts(policy, task, config.train, int(config.video))
    training, held_out = split_episodes(demos, config.data, config.seed)
    learnt = learnt_steps(demos.arrays, config.data.only_source, demos.source)
    parts = datasets(demos)
    if config.data.normalizers == "each" and parts:  # the policy that is judged has those of the first store
        name, first = next(iter(parts.items()))
        logger.info("With normalisers of each store, the policy is judged on episodes of %s.", name)
        training, held_out = ([e for e in episodes if e in first] for episodes in (training, held_out))
    return OpenLoop(task, demos, training, held_out, learnt, config.seed)


def find_demonstrations(config: TrainingRunConfig, task: Task) -> Demonstrations:
    """The stores that ``data.path`` names, or else the task's own."""
    paths = config.data.paths or tuple(filter(None, [config.env.get("demonstrations")]))
    if not paths:
        raise ConfigError(f"Task '{task.name}' names no demonstrations; add data.path=STORE.")
    path = paths[0]
    if not config.data.path and not resolve_path(path).exists():
        raise DataError(
            f"The demonstrations of '{task.name}' are not at {path} yet; with this command's env settings, "
            "make them by flowpolicy collect-demos, or import a recording by flowpolicy import-demos "
            f"source=FILE out={path}."
        )
    limit = config.data.image_memory_gb
    memory = None if limit is None else int(limit * 1e9)
    keys, kinds = config.data.observation_keys, config.data.kinds
    if len(paths) == 1 and config.data.image_size is None:
        return read_demonstrations(path, keys, memory, kinds)
    return read_stores(paths, keys, memory, kinds, config.data.image_size)


def run_folder(path: Path, kind: str) -> RunFolder:
    """The folder of a training run of this kind."""
    return RunFolder(path, kind, state=STATE_FOLDER, result=SUMMARY)

"""A fine-tuning run of any kind, from settings to a run folder with evaluations, plots, video and summary."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.evaluation.result import EvaluationResult
from flowpolicy.evaluation.rollout import check_spaces, evaluate
from flowpolicy.evaluation.statistics import paired_difference_interval
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.evaluation.task import Task, task_from
from flowpolicy.evaluation.video import side_by_side
from flowpolicy.files.reading import read_json
from flowpolicy.finetuning.algorithm import ChunkLearning
from flowpolicy.finetuning.chain import chain_steps
from flowpolicy.finetuning.config import OnlineConfig
from flowpolicy.finetuning.native_environments import NativeChunks, native_task
from flowpolicy.finetuning.recorder import STATE_FILE, Recorder
from flowpolicy.finetuning.self_distillation import self_distill
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv
from flowpolicy.finetuning.staggered import make_staggered
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.rounding import three_digits
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.distributed import Processes, processes
from flowpolicy.runs.loggers import Loggers, build_loggers, read_metrics
from flowpolicy.runs.run_folder import (
    RunFolder,
    comparable_settings,
    default_settings,
    refuse_other_settings,
)

logger = logging.getLogger(__name__)
BASE, CHECKPOINT = "base", "checkpoint"
_REPORTING = (
    "resume", "device", "video", "evaluate_every", "evaluate_episodes", "final_episodes", "loggers",
    "evaluation_envs", "save_every", "wandb", "threads", "workers", "env.native",
)  # fmt: skip
"""Settings that a resumed run may change: where it computes, and where and how often it reports."""


class Recipe(ABC):
    """What a run trains its policy with: the part in which kinds of fine-tuning differ.

    What is refused is refused when one is constructed, before anything is simulated.

    Args:
        config: the run's settings.
        base: the pretrained policy.
        group: this process among those of the run.

    Attributes:
        kind: of run, the name of its script.
        named: what groups of the settings choose by name, such as ``algorithm``.
    """

    kind: ClassVar[str]
    named: Mapping[str, Any] = {}

    def __init__(self, config: OnlineConfig, base: FlowPolicy, group: Processes) -> None:
        self.config, self.base, self.group = config, base, group

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """What the tuned policy says that it was tuned with."""

    @abstractmethod
    def new(self, policy: FlowPolicy, env: VecEnv, task: Task) -> ChunkLearning:
        """The model that trains ``policy``, a copy of the base, in place."""

    @abstractmethod
    def load(self, path: Path, env: VecEnv | None) -> ChunkLearning:
        """The model of a saved state; without an environment to look at it."""


def run_online(
    config: OnlineConfig,
    recipe: type[Recipe],
    run_dir: Path,
    command: str = "",
) -> Path | None:
    """Run; returns the path of ``summary.json`` (None on all processes but the first).

    Raises:
        FlowPolicyError: a setting, the checkpoint, the task or a saved state is not usable, or the
            environments answer with something that is not finite.
    """
    with processes(config.device) as group:
        return _run(config, recipe, run_dir, command, group)


def _run(
    config: OnlineConfig, kind: type[Recipe], run_dir: Path, command: str, group: Processes
) -> Path | None:
    from flowpolicy.plots.learning import plot_finetuning

    started = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device, group.local_rank)
    task = task_from(config.env)
    folder = RunFolder(run_dir, kind.kind, state=STATE_FILE, result=CHECKPOINT)
    is_old = folder.continues(resume=config.resume)
    base = FlowPolicy.load(run_dir / BASE if is_old else config.checkpoint, device)
    config = dataclasses.replace(config, num_steps=chain_steps(base, config.num_steps))
    settings = comparable_settings(config, _REPORTING)
    _check_base(base, task, config)
    recipe = kind(config, base, group)
    if is_old:
        defaults = default_settings(config, **recipe.named)
        refuse_other_settings(run_dir, read_json(run_dir / "config.json"), settings, defaults)
    loggers = _loggers(config, run_dir, settings, recipe) if group.is_first else Loggers()
    if group.is_first and not is_old:
        base.save(run_dir / BASE)
        folder.begin(settings)
    group.wait()
    env = _environments(config, task, base, group)
    try:
        model = (
            recipe.load(run_dir / STATE_FILE, env) if is_old else recipe.new(_copy(config, base), env, task)
        )
        before = _evaluated(config, task, base, run_dir, "before", group)
        if before is not None:
            logger.info(
                "%s on %s, K = %d: %s as pretrained",
                base.spec.name,
                task.name,
                config.num_steps,
                _shown(before),
            )
        recorder = Recorder(
            run_dir if group.is_first else None,
            total_steps=config.total_steps,
            save_every=config.save_every,
            evaluate_every=config.evaluate_every,
            evaluate=lambda policy: evaluate(
                policy, task, episodes=config.evaluate_episodes, num_envs=config.evaluation_envs,
                seed=EVALUATION_ON_THE_WAY, show_progress=False,
            ).scalars(),
            loggers=loggers,
        )  # fmt: skip
        if is_old:
            logger.info("Continuing %s at %s environment steps.", run_dir, f"{model.num_timesteps:,}")
        left = config.total_steps - model.num_timesteps
        if left > 0:
            model.learn(left, callback=recorder, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
        tuned = _finished(config, task, model, recipe.algorithm)
    finally:
        env.close()
    if not group.is_first:
        return None
    tuned.save(run_dir / CHECKPOINT)
    after = _evaluated(config, task, tuned, run_dir, "after", group)
    if after is not None:
        loggers.log(model.num_timesteps, after.scalars())
    loggers.close()
    metrics = _metrics(model, before, after)
    if config.video and before is not None and before.video and after is not None and after.video:
        titles = ("pretrained", f"fine-tuned for {model.num_timesteps:,} steps")
        side_by_side(before.video, after.video, run_dir / "video.mp4", titles=titles)
    plot_finetuning(
        read_metrics(run_dir / "metrics.csv"),
        run_dir / "curves.png",
        title=f"{task.name}, {base.spec.name}, K = {config.num_steps}, T_e = {task.execute_horizon}",
        metric=task.metric,
        before=None if before is None else before.metrics(),
        after=None if after is None else after.metrics(),
    )
    return write_summary(
        run_dir, task=task.name, policy=base.spec.name, seed=config.seed, steps=model.num_timesteps,
        wall_seconds=time.perf_counter() - started, metrics=metrics, checkpoint=str(run_dir / CHECKPOINT),
        command=command, parameters=base.num_parameters(), base=str(config.checkpoint),
        num_steps=config.num_steps, execute_horizon=task.execute_horizon, processes=group.count,
    )  # fmt: skip


EVALUATION_ON_THE_WAY = 3_000_000
"""First seed of evaluations during fine-tuning: not those of the final one, which nothing was chosen on."""


def _check_base(base: FlowPolicy, task: Task, config: OnlineConfig) -> None:
    base.checked(SamplerSpec(num_steps=config.num_steps, solver="euler", grid=config.grid))
    if (task.obs_horizon, task.action_horizon) != (base.spec.obs_horizon, base.spec.action_horizon):
        raise ConfigError(
            f"The checkpoint takes {base.spec.obs_horizon} observations and gives "
            f"{base.spec.action_horizon} actions, which does not fit env.obs_horizon={task.obs_horizon} and "
            f"env.action_horizon={task.action_horizon}; set those to fit it."
        )
    with contextlib.closing(task.make()) as environment:
        try:
            check_spaces(environment, base, f"Task '{task.name}'")
        except TaskError as error:
            trained_for = base.spec.task.get("name")
            hint = f" (env={trained_for})" if trained_for and trained_for != task.name else ""
            raise TaskError(f"{str(error).rstrip('.')}{hint}.") from error


def _loggers(config: OnlineConfig, run_dir: Path, settings: Mapping[str, Any], recipe: Recipe) -> Loggers:
    """Built early: a missing package is not found after an hour. The CSV is cut where the state is."""
    state = run_dir / STATE_FILE
    done = recipe.load(state, None).num_timesteps if state.exists() else 0
    return build_loggers(config.loggers, run_dir, settings, config.wandb, done)


def _environments(config: OnlineConfig, task: Task, base: FlowPolicy, group: Processes) -> VecEnv:
    """This process's share of the environments."""
    if config.num_envs % group.count:
        raise ConfigError(f"num_envs is {config.num_envs}; it must be a multiple of {group.count} processes.")
    here, total = config.num_envs // group.count, config.num_envs
    makers: list[Callable[[], Any]] = [task.make] * here
    if config.stagger:
        first = group.rank * here
        makers = [partial(make_staggered, task, first + i, total) for i in range(here)]
    workers = config.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        each = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = each if each > 1 else 0
    keys = tuple(base.spec.observation_shapes)
    if config.env.get("native"):
        native = _native_environments(config.env["native"], makers, keys, base.spec.obs_horizon, workers)
        if native is not None:
            return native
    if workers == 0:
        return DummyVecEnv(makers)
    return ChunkedVecEnv.in_processes(makers, workers, keys, base.spec.obs_horizon)


def _native_environments(
    name: str, makers: Sequence[Callable[[], Any]], keys: Sequence[str], obs_horizon: int, threads: int
) -> VecEnv | None:
    """None, and a warning, where the environments are not as the native task knows them."""
    kind = native_task(name)
    envs = [make() for make in makers]
    try:
        return ChunkedVecEnv(NativeChunks(envs, keys, obs_horizon, kind, threads=max(threads, 1)))
    except TaskError as error:
        logger.warning("%s The environments' own step is used (env.native=null says so).", error)
        for env in envs:
            env.close()
        return None


def _copy(config: OnlineConfig, base: FlowPolicy) -> FlowPolicy:
    """A copy of the base to train, which has the run's ``action_clip``."""
    clip = base.config.action_clip if config.action_clip is None else config.action_clip
    policy = FlowPolicy(dataclasses.replace(base.config, action_clip=clip)).to(base.device)
    policy.load_state_dict(base.state_dict())
    return policy.eval()


def _finished(config: OnlineConfig, task: Task, model: ChunkLearning, algorithm: str) -> FlowPolicy:
    """The policy to deploy."""
    tuned = model.deployed_policy()
    if config.distill.steps:
        observations = model.visited_observations()  # may collect once more, which all processes do together
        if model.processes.is_first:
            tuned = self_distill(tuned, observations, config.distill, seed=config.seed)
    metadata = model.origin(tuned, algorithm, config.num_steps) | {"distilled": bool(config.distill.steps)}
    tuned.config = dataclasses.replace(tuned.config, task=dataclasses.asdict(task), metadata=metadata)
    return tuned


def _evaluated(
    config: OnlineConfig, task: Task, policy: FlowPolicy, run_dir: Path, label: str, group: Processes
) -> EvaluationResult | None:
    """Episodes as deployed: x_0 ~ N(0, I), no injected noise, the same seeds before and after."""
    if not config.final_episodes or not group.is_first:
        return None
    result = evaluate(
        policy, task, episodes=config.final_episodes, num_envs=config.evaluation_envs,
        num_steps=config.num_steps, record=int(config.video), video=run_dir / f"{label}.mp4",
    )  # fmt: skip
    result.write_csv(run_dir / f"episodes_{label}.csv")
    return result


def _metrics(
    model: ChunkLearning, before: EvaluationResult | None, after: EvaluationResult | None
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "seconds": dict(model.seconds),
        "worker_restarts": model.worker_restarts,
        "iterations": model.iteration,
        "updates": model._n_updates,
    }
    if before is None or after is None:
        return metrics
    metrics["base"], metrics["tuned"] = before.metrics(), after.metrics()
    metrics["return_gain"] = float((after.returns - before.returns).mean())
    metrics["return_gain_ci95"] = list(paired_difference_interval(after.returns, before.returns))
    if before.success is not None and after.success is not None:
        metrics["success_gain"] = float(after.success.mean() - before.success.mean())
        metrics["success_gain_ci95"] = list(
            paired_difference_interval(after.success.astype(float), before.success.astype(float))
        )
    return metrics


def _shown(result: EvaluationResult) -> str:
    metrics = result.metrics()
    low, high = metrics["return_ci95"]
    text = f"return {three_digits(metrics['return_mean'])} [{three_digits(low)}, {three_digits(high)}]"
    if metrics["success_rate"] is not None:
        text += f", success {metrics['success_rate']:.2f}"
    return text

"""One pretraining run, from settings to a run folder: data, policy, training, evaluation, plots, summary."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowpolicy.data.command_source import learnt_steps
from flowpolicy.data.mixture import datasets, read_stores
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.evaluation.task import Task, task_from
from flowpolicy.features.vision.pretrained import load_pretrained
from flowpolicy.flow import build_objective
from flowpolicy.models.network import NetworkConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.pretraining.config import DataConfig, TrainConfig
from flowpolicy.pretraining.initial import start_from
from flowpolicy.pretraining.judging import Judge, OpenLoop, Rollouts
from flowpolicy.pretraining.state import STATE_FOLDER
from flowpolicy.pretraining.stores import (
    describe,
    fit,
    learnt_space,
    make_samplers,
    observed_features,
    policies_of_stores,
    report,
    split_episodes,
)
from flowpolicy.pretraining.trainer import CHECKPOINT, Trainer
from flowpolicy.ranges import Episodes, NonNegativeInt
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.distributed import Processes, processes
from flowpolicy.runs.loggers import build_loggers, read_metrics
from flowpolicy.runs.run_folder import PRETRAINING, RunFolder, comparable_settings
from flowpolicy.settings import Settings, build

logger = logging.getLogger(__name__)
MANY_LOST = 0.001  # share of steps from which on it is a warning
_REPORTING = (
    "resume", "device", "video", "data.image_memory_gb", "train.log_every", "train.evaluate_every",
    "train.evaluate_episodes", "train.final_episodes", "train.num_envs", "train.save_every", "train.loggers",
    "train.wandb", "train.threads", "train.validate_every", "env.native",
)  # fmt: skip
"""Settings that a resumed run may change: where images lie, and where and how often it reports."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Settings):
    """Everything a pretraining run depends on.

    Attributes:
        env: the task's settings, and its ``demonstrations``.
        policy: the objective's name and settings.
        model: sizes of the network.
        data: which demonstrations and how they are cut.
        train: optimisation, evaluation and bookkeeping.
        seed: of weights, batches, noise and the choice of held-out episodes.
        device: ``auto`` takes a GPU where there is one.
        resume: continue the run in ``run_dir``.
        video: episodes of the final evaluation to record; true records one, false none.
        init: checkpoint whose weights and normalisers training starts from; None starts from random weights.
    """

    env: dict[str, Any]
    policy: dict[str, Any]
    model: NetworkConfig
    data: DataConfig
    train: TrainConfig
    seed: NonNegativeInt = 0
    device: str = "auto"
    resume: bool = False
    video: Episodes = True
    init: str | None = None


def pretrain(settings: Mapping[str, Any], run_dir: Path, *, command: str = "") -> Path | None:
    """Run; returns the path of ``summary.json`` (None on all processes but the first).

    Raises:
        FlowPolicyError: a setting, the demonstrations, the task or a saved state is not usable.
    """
    config = build(PretrainConfig, {k: v for k, v in settings.items() if k != "run_dir"}, "")
    with processes(config.device) as group:
        return _run(config, run_dir, command, group)


def find_or_pretrain(settings: Mapping[str, Any], run_dir: Path) -> Path:
    """The checkpoint of the pretraining run in ``run_dir``, which is done or finished first where need be."""
    with processes(settings["device"]) as group:
        # The first process may have waited for another program to make it: what it sees holds for all.
        (is_done,) = group.gather(float((run_dir / "summary.json").exists()))[0]
    if not is_done:
        logger.info("No pretrained policy in %s yet; pretraining one first.", run_dir)
        pretrain({**settings, "resume": True}, run_dir, command=f"(for fine-tuning, into {run_dir})")
    return run_dir / CHECKPOINT


def _run(config: PretrainConfig, run_dir: Path, command: str, group: Processes) -> Path | None:
    started = time.perf_counter()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = resolve_device(config.device, group.local_rank)
    task = task_from(config.env)
    settings = comparable_settings(config, _REPORTING)
    folder = RunFolder(run_dir, PRETRAINING, state=STATE_FOLDER, result="summary.json")
    folder.continues(resume=config.resume)
    demos = find_demonstrations(config, task)
    task.check_actions(demos.arrays["action"].shape[1], demos.source)
    torch.manual_seed(config.seed)
    policy = make_policy(config, task, demos)
    judge = _judge(config, task, policy, demos)
    training, validation = make_samplers(policy.to(device), demos, config.data, config.seed)
    mixture = describe(demos, training)
    if group.is_first:
        folder.begin(settings)
        logger.info(
            "%s on %s: %d episodes, %s steps; %s parameters on %s",
            policy.spec.name, task.name, demos.num_episodes, f"{demos.num_steps:,}",
            f"{policy.num_parameters():,}", device,
        )  # fmt: skip
        report(mixture)
        _report_lost(policy)
        judge.announce()

    trainer = Trainer(
        policy, training, validation, config.train,
        run_dir=run_dir, seed=config.seed, processes=group, settings=settings,
        evaluate=judge.on_the_way,
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
    if not (run_dir / CHECKPOINT).exists():  # lost from a run that was finished: its state has the weights
        trainer.save()
    metrics: dict[str, Any] = {
        "demo_return_mean": policy.spec.metadata["demo_return_mean"],
        "lost_actions": policy.spec.metadata["lost_actions"],
        "train_seconds": time.perf_counter() - started,
    }
    if config.train.final_episodes:
        found, scalars = judge.at_the_end(result, run_dir)
        metrics.update(found)
        trainer.loggers.log(trainer.state.step, scalars)
    trainer.loggers.close()
    _plot(run_dir, task, policy.spec.name, metrics)
    if mixture:
        metrics["mixture"] = mixture
    if config.data.normalizers == "each":
        _save_each(result, demos, run_dir)
    return write_summary(
        run_dir, task=task.name, policy=policy.spec.name, seed=config.seed, steps=config.train.steps,
        wall_seconds=time.perf_counter() - started, metrics=metrics, checkpoint=str(run_dir / CHECKPOINT),
        command=command, parameters=policy.num_parameters(), execute_horizon=task.execute_horizon,
    )  # fmt: skip


def _judge(config: PretrainConfig, task: Task, policy: FlowPolicy, demos: Demonstrations) -> Judge:
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


def find_demonstrations(config: PretrainConfig, task: Task) -> Demonstrations:
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


def _plot(run_dir: Path, task: Task, policy: str, metrics: dict[str, Any]) -> None:
    """Draw the curves, and put the last validation figures among the ``metrics``."""
    from flowpolicy.plots.learning import plot_learning_curves

    history = read_metrics(run_dir / "metrics.csv")
    for row in history:
        metrics.update({key: value for key, value in row.items() if key.startswith("validation/")})
    plot_learning_curves(
        history,
        run_dir / "curves.png",
        title=f"{task.name}, {policy}",
        metric=task.metric,
        demo_mean=metrics["demo_return_mean"] if task.metric == "return" else None,
    )


def make_policy(config: PretrainConfig, task: Task, demos: Demonstrations) -> FlowPolicy:
    """A policy of the demonstrations' shapes with fitted normalisers; weights from torch's global seed, or
    both from the checkpoint ``config.init``."""
    returns = demos.episode_returns
    metadata = {
        "demonstrations": Path(demos.source).name,
        "demo_episodes": demos.num_episodes,
        "demo_return_mean": None if returns is None else float(returns.mean()),
        "steps": config.train.steps,
        "seed": config.seed,
    }
    if "env_version" in demos.attributes:  # evaluation says where another one is installed
        metadata["env_version"] = demos.attributes["env_version"]
    build_objective(config.policy)  # refuses bad settings before any work
    start = None if config.init is None else FlowPolicy.load(config.init)
    keeps = start is not None and config.data.normalizers is None  # so that it stays the same function
    scaling: Any = start.config if start is not None and keeps else config.data
    features = observed_features(demos, config.data.observation_keys)
    action_dim = demos.arrays["action"].shape[1]
    policy = FlowPolicy(
        PolicyConfig(
            objective=dict(config.policy),
            model=config.model,
            observations=features,
            action_dim=action_dim,
            obs_horizon=task.obs_horizon,
            action_horizon=task.action_horizon,
            execute_horizon=task.execute_horizon,
            observation_normalization=scaling.observation_normalization,
            action_normalization=scaling.action_normalization,
            action_clip=scaling.action_clip,
            actions=learnt_space(config.data, features, action_dim, start),
            task=dataclasses.asdict(task),
        )
    )
    if start is None:
        load_pretrained(policy.network)
    first = next(iter(datasets(demos).values()), None) if config.data.normalizers == "each" else None
    arrays, action = fit(policy, demos, first)
    if start is not None:
        start_from(start, policy, str(config.init))
        metadata["init"] = str(config.init)
        if keeps:
            policy.load_normalizers(start)
    metadata["lost_actions"] = policy.lost_actions(action)
    metadata["lost_observations"] = policy.lost_observations(arrays)
    policy.config = dataclasses.replace(policy.config, metadata=metadata)
    return policy


def _save_each(result: FlowPolicy, demos: Demonstrations, run_dir: Path) -> None:
    """The trained weights with the normalisers of each store, as ``checkpoint_<name>``."""
    for name, own in policies_of_stores(result.cpu(), demos).items():
        own.save(run_dir / f"{CHECKPOINT}_{name}")


def _report_lost(policy: FlowPolicy) -> None:
    """Say which demonstrated numbers normalisation cuts off."""
    config = policy.config
    parts = {"action": (config.metadata["lost_actions"], config.action_clip, config.action_normalization)}
    for key, share in config.metadata["lost_observations"].items():
        clip = policy.observation_normalizers[key].clip
        parts[f"observation '{key}'"] = (share, clip, config.observation_normalization)
    for name, (share, clip, mode) in parts.items():
        if share > 0:
            level = logging.WARNING if share > MANY_LOST else logging.INFO
            logger.log(
                level,
                "%.3g%% of the demonstrated steps have an %s beyond %g in normalised units (%s), where it is "
                "cut off; choose another mode, or scale the data.",
                *(100 * share, name, clip, mode),
            )

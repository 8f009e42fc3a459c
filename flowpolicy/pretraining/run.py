"""One pretraining run, from settings to a run folder: data, policy, training, evaluation, plots, summary."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowpolicy.data.mixture import datasets
from flowpolicy.data.store import Demonstrations
from flowpolicy.evaluation.task import Task, task_from
from flowpolicy.features.vision.pretrained import load_pretrained
from flowpolicy.flow import build_objective
from flowpolicy.models.network import NetworkConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.pretraining.initial import start_from
from flowpolicy.pretraining.stores import (
    describe,
    fit,
    learnt_space,
    make_samplers,
    observed_features,
    policies_of_stores,
    report,
)
from flowpolicy.pretraining.trainer import CHECKPOINT
from flowpolicy.pretraining.training_run import (
    SUMMARY,
    TrainingRun,
    TrainingRunConfig,
    find_demonstrations,
    judge_of,
    run_folder,
)
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.distributed import Processes, processes
from flowpolicy.runs.run_folder import PRETRAINING
from flowpolicy.settings import build

logger = logging.getLogger(__name__)
MANY_LOST = 0.001  # share of steps from which on it is a warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingRunConfig):
    """Everything a pretraining run depends on.

    Attributes:
        policy: the objective's name and settings.
        model: sizes of the network.
    """

    policy: dict[str, Any]
    model: NetworkConfig


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
        (is_done,) = group.gather(float((run_dir / SUMMARY).exists()))[0]
    if not is_done:
        logger.info("No pretrained policy in %s yet; pretraining one first.", run_dir)
        pretrain({**settings, "resume": True}, run_dir, command=f"(for fine-tuning, into {run_dir})")
    return run_dir / CHECKPOINT


def _run(config: PretrainConfig, run_dir: Path, command: str, group: Processes) -> Path | None:
    run = TrainingRun(config, run_folder(run_dir, PRETRAINING), group, command)
    device = resolve_device(config.device, group.local_rank)
    task = task_from(config.env)
    demos = find_demonstrations(config, task)
    task.check_actions(demos.arrays["action"].shape[1], demos.source)
    torch.manual_seed(config.seed)
    policy = make_policy(config, task, demos)
    judge = judge_of(config, task, policy, demos)
    training, validation = make_samplers(policy.to(device), demos, config.data, config.seed)
    mixture = describe(demos, training)
    if group.is_first:
        logger.info(
            "%s on %s: %d episodes, %s steps; %s parameters on %s",
            policy.spec.name, task.name, demos.num_episodes, f"{demos.num_steps:,}",
            f"{policy.num_parameters():,}", device,
        )  # fmt: skip
        report(mixture)
        _report_lost(policy)
    trained = run.train(policy, training, validation, judge, task)
    if trained is None:
        return None
    result, metrics = trained
    if mixture:
        metrics["mixture"] = mixture
    if config.data.normalizers == "each":
        _save_each(result, demos, run_dir)
    return run.summarize(result, task, metrics)


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

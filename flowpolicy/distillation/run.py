"""One distillation run, from settings to a run folder: teacher, pairs, student, training, evaluation."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.data.store import Demonstrations
from flowpolicy.distillation.method import Method
from flowpolicy.distillation.methods import build_method
from flowpolicy.distillation.pairs import PairSampler, PairsConfig, make_pairs, read_pairs
from flowpolicy.evaluation.task import task_of
from flowpolicy.features.presence import Presence
from flowpolicy.features.vision.pretrained import load_pretrained
from flowpolicy.models.network import NetworkConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.config import DataConfig
from flowpolicy.pretraining.initial import start_from
from flowpolicy.pretraining.stores import normalized, split_episodes
from flowpolicy.pretraining.training_run import (
    TrainingRun,
    TrainingRunConfig,
    find_demonstrations,
    judge_of,
    run_folder,
)
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.distributed import Processes, processes
from flowpolicy.runs.run_folder import DISTILLATION
from flowpolicy.settings import build

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig(TrainingRunConfig):
    """Everything a distillation run depends on.

    Attributes:
        checkpoint: the teacher.
        method: name and settings of the method.
        pairs: how the teacher's pairs are made.
        model: sizes of the student; None: the teacher's.
    """

    checkpoint: str
    method: dict[str, Any]
    pairs: PairsConfig
    model: NetworkConfig | None = None


def distill(settings: Mapping[str, Any], run_dir: Path, *, command: str = "") -> Path | None:
    """Run; returns the path of ``summary.json`` (None on all processes but the first).

    Raises:
        FlowPolicyError: a setting, the teacher, the demonstrations, the pairs or a saved state is not usable.
    """
    given = {key: value for key, value in settings.items() if key != "run_dir"}
    config = build(DistillationConfig, {**given, "env": given.get("env") or {}}, "")
    with processes(config.device) as group:
        return _run(config, run_dir, command, group)


def _run(config: DistillationConfig, run_dir: Path, command: str, group: Processes) -> Path | None:
    run = TrainingRun(config, run_folder(run_dir, DISTILLATION), group, command)
    device = resolve_device(config.device, group.local_rank)
    teacher = FlowPolicy.load(config.checkpoint, device)
    task = task_of(teacher.spec.task, config.env, config.checkpoint)
    method = build_method(config.method, teacher)
    if method.follows_noise:
        teacher.require_unsteered(f"method={method.name}")
    demos = find_demonstrations(dataclasses.replace(config, data=_as_read(teacher, config.data)), task)
    torch.manual_seed(config.seed)
    student = make_student(teacher, method, config)
    judge = judge_of(config, task, student, demos)
    training, validation = _samplers(teacher, demos, method, config, run_dir, group)
    if group.is_first:
        steps = "any K" if method.sampling is None else f"K = {method.sampling.num_steps}"
        logger.info(
            "%s to %s: %s pairs, %s parameters of the teacher's %s on %s",
            method.name, steps, f"{config.pairs.count:,}", f"{student.num_parameters():,}",
            f"{teacher.num_parameters():,}", device,
        )  # fmt: skip
    prepared = time.perf_counter() - run.started
    trained = run.train(student.to(device), training, validation, judge, task, method)
    if trained is None:
        return None
    result, metrics = trained
    about = {"method": method.name, "num_steps": student.sampling.num_steps, "teacher": config.checkpoint}
    return run.summarize(result, task, {**about, "prepare_seconds": prepared, **metrics})


def make_student(teacher: FlowPolicy, method: Method, config: DistillationConfig) -> FlowPolicy:
    """A policy with the teacher's normalisers, no steering, and the mark of the method's K where it has one.

    Its weights are those of ``init``, or else the teacher's, or where the sizes differ random ones of torch's
    global seed.
    """
    metadata = {
        **teacher.spec.metadata,
        "steps": config.train.steps,
        "seed": config.seed,
        "distillation": {"teacher": config.checkpoint, "method": dict(config.method), "init": config.init},
    }
    model = config.model or teacher.config.model
    student = FlowPolicy(
        dataclasses.replace(
            teacher.config, model=model, tuned=method.sampling, steering=None, metadata=metadata
        )
    )
    student.load_normalizers(teacher)
    if config.init is not None:
        start_from(FlowPolicy.load(config.init), student, config.init)
    elif model == teacher.config.model:
        student.network.load_state_dict(teacher.network.state_dict())
    else:
        load_pretrained(student.network)
    return student


def _samplers(
    teacher: FlowPolicy,
    demos: Demonstrations,
    method: Method,
    config: DistillationConfig,
    run_dir: Path,
    group: Processes,
) -> tuple[PairSampler, PairSampler | None]:
    """The pairs of the episodes that are trained on, and of those that are held out."""
    observation, action, _ = normalized(teacher, demos, None)
    given = (observation, action, demos.episode_ends, teacher.spec.obs_horizon)
    folder = Path(config.pairs.path).expanduser() if config.pairs.path else run_dir / "pairs"
    if group.is_first:
        make_pairs(teacher, ChunkSampler(*given, 1), Path(demos.source).name, config.pairs, folder)
    group.wait()
    pairs = read_pairs(teacher, demos.num_steps, config.pairs, folder)
    train_episodes, held_out = split_episodes(demos, config.data, config.seed)
    if not method.follows_noise:
        pairs = dataclasses.replace(pairs, noise=None)
    return PairSampler(*given, pairs, train_episodes), (
        PairSampler(*given, pairs, held_out) if held_out else None
    )


def _as_read(teacher: FlowPolicy, data: DataConfig) -> DataConfig:
    """The observations of the teacher; whether one is there is not among what a store holds."""
    kinds = {
        key: feature.declaration()
        for key, feature in teacher.spec.features.items()
        if not isinstance(feature, Presence)
    }
    return dataclasses.replace(data, observation_keys=tuple(kinds), kinds=kinds)

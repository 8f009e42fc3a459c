"""One run of learning from preferences, from settings to a run folder: pairs, training, evaluation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.evaluation.task import task_of
from flowpolicy.policy import FlowPolicy
from flowpolicy.preferences.labels import rewards
from flowpolicy.preferences.loss import PreferenceLoss
from flowpolicy.preferences.losses import build_loss
from flowpolicy.preferences.pairs import read_pairs, require_same_actions
from flowpolicy.preferences.sampling import PreferenceSampler
from flowpolicy.pretraining.training_run import TrainingRun, TrainingRunConfig, judge_of, run_folder
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.distributed import Processes, processes
from flowpolicy.runs.run_folder import PREFERENCES
from flowpolicy.settings import build, require

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferencesConfig(TrainingRunConfig):
    """Everything a run depends on.

    Attributes:
        checkpoint: the policy that acted in the segments, and that is fine-tuned.
        pairs: store of the segments.
        label: ``return``, ``page`` or ``module:function``.
        loss: name and settings of the loss.
    """

    checkpoint: str
    pairs: str
    label: str = "return"
    loss: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.train.batch_size
        require(size % 2 == 0, "train.batch_size", size, "even, as decisions come two by two")


def finetune_preferences(settings: Mapping[str, Any], run_dir: Path, *, command: str = "") -> Path | None:
    """Run; returns the path of ``summary.json`` (None on all processes but the first).

    Raises:
        FlowPolicyError: a setting, the policy, the pairs, the labels or a saved state is not usable.
    """
    given = {key: value for key, value in settings.items() if key != "run_dir"}
    config = build(PreferencesConfig, {**given, "env": given.get("env") or {}}, "")
    with processes(config.device) as group:
        return _run(config, run_dir, command, group)


def _run(config: PreferencesConfig, run_dir: Path, command: str, group: Processes) -> Path | None:
    run = TrainingRun(config, run_folder(run_dir, PREFERENCES), group, command)
    reference = FlowPolicy.load(config.checkpoint, resolve_device(config.device, group.local_rank))
    reference.require_unsteered("Fine-tuning on preferences")
    task = task_of(reference.spec.task, config.env, config.checkpoint)
    loss = build_loss(config.loss, reference)
    pairs = read_pairs(config.pairs, reference.spec.features)
    require_same_actions(pairs, (reference.spec.action_horizon, reference.spec.action_dim))
    found = rewards(pairs, config.label, config.pairs)
    held_out = round(config.data.validation_fraction * len(pairs))
    order = np.random.default_rng(config.seed).permutation(len(pairs)).tolist()
    training = PreferenceSampler(reference, pairs, found, sorted(order[held_out:]))
    validation = PreferenceSampler(reference, pairs, found, sorted(order[:held_out])) if held_out else None
    policy = _start(reference, loss, config)
    judge = judge_of(config, task, policy, pairs.demos)
    if group.is_first:
        logger.info(
            "%s from %d of %d pairs of %s, label=%s",
            loss.name, training.num_pairs, len(pairs), config.pairs, config.label,
        )  # fmt: skip
    trained = run.train(policy, training, validation, judge, task, loss)
    if trained is None:
        return None
    result, metrics = trained
    about = {"loss": loss.name, "label": config.label, "pairs": training.num_pairs}
    return run.summarize(result, task, {**about, "reference": config.checkpoint, **metrics})


def _start(reference: FlowPolicy, loss: PreferenceLoss, config: PreferencesConfig) -> FlowPolicy:
    """A copy of the reference that says what it will have learnt from."""
    about = {"reference": config.checkpoint, "pairs": Path(config.pairs).name, "label": config.label}
    metadata = {**reference.spec.metadata, "preferences": {**about, "loss": dict(config.loss)}}
    policy = FlowPolicy(dataclasses.replace(reference.config, tuned=loss.tuned, metadata=metadata))
    policy.load_state_dict(reference.state_dict())
    return policy.to(reference.device)

"""Settings of the supervised trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from flowpolicy.data.normalization import LARGEST_CLIP, MODES
from flowpolicy.policy.action_space import SPACES
from flowpolicy.ranges import (
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    not_empty,
    one_of,
    positive_to,
)
from flowpolicy.runs.loggers import LOGGERS
from flowpolicy.settings import Settings, require

NORMALIZERS = ("shared", "each")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class DataConfig(Settings, prefix="data"):
    """Which demonstrations, and how they are cut.

    Attributes:
        path: store to train on, or several; None takes the task's own.
        weights: how much of each batch comes from each of several stores, in proportion; None: as they have
            steps.
        image_size: height and width that images are resized to; None: that of the first store with them.
        normalizers: ``shared`` statistics of all stores, or ``each`` store's own, of which the checkpoint
            keeps the first one's. None: shared, or those of the checkpoint that training starts from.
        observation_keys: store keys given to the policy, each under its own name.
        kinds: store key -> what it holds (``depth``, ``pose``, ...), by the name of the kind or by
            ``{kind: name, ...}`` with settings of it, where the store does not declare it.
        validation_fraction: share of the episodes held out (at least one episode, unless 0).
        validation_mask: hold out the episodes of this mask of the store instead, e.g. robomimic's ``valid``.
        only_source: of recorded runs, learn only from the steps at which the ``operator`` was in command, or
            the ``policy``; None learns from both. Safe actions are never learnt, and demonstrations that do
            not say who was in command are learnt whole.
        max_episodes: train on this many episodes, drawn by the seed, of each store; None takes all.
        action_space: what is learnt of the actions, ``absolute`` (also None), ``delta`` or ``relative``; the
            policy gives absolute ones. None takes that of the checkpoint that training starts from.
        action_state: the observation that ``delta`` and ``relative`` subtract, or a list with an entry for
            each dimension; see :func:`~flowpolicy.policy.action_space.action_config`.
        rotations: dimensions of the actions that are rotations, learnt without jumps: kind -> the first of
            each, e.g. ``{rotation_vector: [3]}``.
        observation_normalization: ``minmax``, ``gaussian``, ``quantile`` or ``none``.
        action_normalization: the same, for actions.
        action_clip: bound of a sampled action in normalised units; no demonstrated action lies beyond it,
            unless it is below 1 or nothing is normalised.
        image_memory_gb: memory for the images of one key; more are read from disk as they are needed. None
            is half of what is free.
    """

    path: str | tuple[str, ...] | None = None
    weights: tuple[PositiveFloat, ...] | None = None
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    normalizers: Annotated[str, one_of(NORMALIZERS)] | None = None
    observation_keys: Annotated[tuple[str, ...], not_empty("key")] = ("observation",)
    kinds: dict[str, Any] | None = None
    validation_fraction: BelowOne = 0.05
    validation_mask: str | None = None
    only_source: Annotated[str, one_of(("operator", "policy"))] | None = None
    max_episodes: PositiveInt | None = None
    action_space: Annotated[str, one_of(SPACES)] | None = None
    action_state: str | tuple[int | str | None, ...] | None = None
    rotations: dict[str, tuple[int, ...]] | None = None
    observation_normalization: Annotated[str, one_of(MODES)] = "minmax"
    action_normalization: Annotated[str, one_of(MODES)] = "minmax"
    action_clip: Annotated[float, positive_to(LARGEST_CLIP)] = 1.0
    image_memory_gb: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.paths)
        require(self.path is None or count > 0, "data.path", self.path, "one store at least")
        if self.weights is not None:
            allowed = f"one weight for each of the {count} stores of data.path"
            require(len(self.weights) == count, "data.weights", list(self.weights), allowed)
        if self.action_normalization in ("gaussian", "none"):
            # One standard deviation, or one physical unit, is no bound of a demonstrated action.
            allowed = "above 1 (5 is usual) unless actions are normalised by minmax or quantile"
            require(self.action_clip > 1, "data.action_clip", self.action_clip, allowed)

    @property
    def paths(self) -> tuple[str, ...]:
        """The stores; empty where they are the task's own."""
        return (self.path,) if isinstance(self.path, str) else self.path or ()


@dataclass(frozen=True)
class TrainConfig(Settings, prefix="train"):
    """Optimisation, evaluation and bookkeeping.

    Attributes:
        steps: optimiser steps.
        batch_size: samples a step, over all processes.
        learning_rate: peak of the warm-up and cosine schedule.
        final_learning_rate: share of the peak left at the end.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        gradient_clip: bound of the gradient's norm.
        ema_decay: of the weights' average, which is what is evaluated and saved.
        precision: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 where the hardware has it (GPU;
            CPU with AVX-512 BF16, for networks wide enough to gain).
        log_every: steps between training metrics.
        validate_every: steps between validation losses and open-loop errors; 0 is never.
        evaluate_every: steps between evaluation rollouts; 0 is only at the end.
        evaluate_episodes: episodes of a rollout on the way.
        final_episodes: episodes of the last evaluation; 0 skips it.
        num_envs: environments stepped side by side in evaluation.
        save_every: steps between checkpoints.
        loggers: any of ``csv``, ``tensorboard``, ``wandb``.
        wandb: keyword arguments of ``wandb.init``; without an account it stays offline.
        threads: CPU threads of torch; None leaves its choice.
    """

    steps: PositiveInt = 3_000
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    final_learning_rate: Share = 0.02
    warmup_steps: NonNegativeInt = 200
    weight_decay: NonNegativeFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: PositiveFloat = 1.0
    ema_decay: BelowOne = 0.995
    precision: Annotated[str, one_of(PRECISIONS, "auto, float32 or bfloat16")] = "auto"
    log_every: PositiveInt = 50
    validate_every: NonNegativeInt = 500
    evaluate_every: NonNegativeInt = 0
    evaluate_episodes: PositiveInt = 20
    final_episodes: NonNegativeInt = 50
    num_envs: PositiveInt = 25
    save_every: PositiveInt = 1_000
    loggers: tuple[Annotated[str, one_of(LOGGERS)], ...] = ("csv",)
    wandb: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None

"""Settings of the supervised trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowpolicy.data.normalization import LARGEST_CLIP, MODES
from flowpolicy.runs.loggers import LOGGERS
from flowpolicy.settings import require

_ONE_OF_MODES = f"one of {', '.join(MODES)}"


@dataclass(frozen=True)
class DataConfig:
    """Which demonstrations, and how they are cut.

    Attributes:
        path: store to train on; None takes the task's own.
        observation_keys: store keys given to the policy, each under its own name.
        kinds: store key -> what it holds (``depth``, ``pose``, ...), by the name of the kind or by
            ``{kind: name, ...}`` with settings of it, where the store does not declare it.
        validation_fraction: share of the episodes held out (at least one episode, unless 0).
        validation_mask: hold out the episodes of this mask of the store instead, e.g. robomimic's ``valid``.
        max_episodes: train on this many episodes, drawn by the seed; None takes all.
        observation_normalization: ``minmax``, ``gaussian``, ``quantile`` or ``none``.
        action_normalization: the same, for actions.
        action_clip: bound of a sampled action in normalised units; no demonstrated action lies beyond it,
            unless it is below 1 or nothing is normalised.
        image_memory_gb: memory for the images of one key; more are read from disk as they are needed. None
            is half of what is free.
    """

    path: str | None = None
    observation_keys: tuple[str, ...] = ("observation",)
    kinds: dict[str, Any] | None = None
    validation_fraction: float = 0.05
    validation_mask: str | None = None
    max_episodes: int | None = None
    observation_normalization: str = "minmax"
    action_normalization: str = "minmax"
    action_clip: float = 1.0
    image_memory_gb: float | None = None

    def __post_init__(self) -> None:
        limit = self.image_memory_gb
        checks = {
            "image_memory_gb": (limit is None or limit >= 0, "0 or more, or null"),
            "observation_keys": (len(self.observation_keys) > 0, "at least one key"),
            "validation_fraction": (0 <= self.validation_fraction < 1, "in [0, 1)"),
            "max_episodes": (self.max_episodes is None or self.max_episodes >= 1, "at least 1"),
            "observation_normalization": (self.observation_normalization in MODES, _ONE_OF_MODES),
            "action_normalization": (self.action_normalization in MODES, _ONE_OF_MODES),
            "action_clip": (0 < self.action_clip <= LARGEST_CLIP, f"positive and at most {LARGEST_CLIP:g}"),
        }
        for name, (holds, allowed) in checks.items():
            require(holds, f"data.{name}", getattr(self, name), allowed)
        if self.action_normalization in ("gaussian", "none"):
            # One standard deviation, or one physical unit, is no bound of a demonstrated action.
            allowed = "above 1 (5 is usual) unless actions are normalised by minmax or quantile"
            require(self.action_clip > 1, "data.action_clip", self.action_clip, allowed)


@dataclass(frozen=True)
class TrainConfig:
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

    steps: int = 3_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02
    warmup_steps: int = 200
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.995
    precision: str = "auto"
    log_every: int = 50
    validate_every: int = 500
    evaluate_every: int = 0
    evaluate_episodes: int = 20
    final_episodes: int = 50
    num_envs: int = 25
    save_every: int = 1_000
    loggers: tuple[str, ...] = ("csv",)
    wandb: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "num_envs", "evaluate_episodes"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("warmup_steps", "validate_every", "evaluate_every", "final_episodes"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        checks = {
            "learning_rate": (self.learning_rate > 0, "positive"),
            "final_learning_rate": (0 <= self.final_learning_rate <= 1, "in [0, 1]"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "gradient_clip": (self.gradient_clip > 0, "positive"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "precision": (
                self.precision in ("auto", "float32", "bfloat16"),
                "auto, float32 or bfloat16",
            ),
        }
        for name, (holds, allowed) in checks.items():
            require(holds, f"train.{name}", getattr(self, name), allowed)
        for name in self.loggers:
            require(name in LOGGERS, "train.loggers", name, f"any of {', '.join(LOGGERS)}")

"""Settings of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.ranges import (
    Allowed,
    BelowOne,
    Episodes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    at_least,
    between,
    one_of,
    within,
)
from flowpolicy.runs.loggers import LOGGERS
from flowpolicy.settings import Settings, require

MOST = 10_000_000
"""Chunks of a buffer or a minibatch, passes over it, episodes that are averaged."""
_Width = Annotated[int, between(1, 8192)]
_FEW = Allowed(lambda widths: len(widths) <= 16, "at most 16 widths between 1 and 8192")
_RATES = {"learning_rate", "critic_learning_rate"}  # of ReinFlow, which takes schedules too


@dataclass(frozen=True)
class ReinFlowConfig(Settings, prefix="reinflow"):
    """Settings of :class:`flowpolicy.finetuning.reinflow.ReinFlow`, which explains them and checks them.

    Attributes:
        final_learning_rate: share of ``learning_rate`` left at the end; it falls linearly.
    """

    n_steps: Annotated[int, between(1, MOST)] = 128
    batch_size: Annotated[int, between(1, MOST)] = 512
    n_epochs: Annotated[int, between(1, MOST)] = 4
    learning_rate: PositiveFloat = 3e-4
    final_learning_rate: Share = 1.0
    critic_learning_rate: PositiveFloat = 1e-3
    adaptive_rate: bool = True
    gamma: Annotated[float, within("(0, 1]")] = 0.995
    gae_lambda: Share = 0.95
    target_kl: PositiveFloat | None = 0.15
    critic_warmup: NonNegativeInt = 3
    max_grad_norm: PositiveFloat = 1.0
    critic_hidden: Annotated[tuple[_Width, ...], _FEW] = (256, 256)
    image_encoder: Annotated[str, one_of(("frozen", "trained"))] = "frozen"
    critic_encoder: Annotated[str, one_of(("shared", "own"))] = "shared"
    ema_decay: BelowOne | None = None


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse (ConfigError) keyword arguments of ReinFlow that are out of range."""
    names = {item.name for item in fields(ReinFlowConfig)} & settings.keys() - _RATES
    ReinFlowConfig(**{name: settings[name] for name in names})
    window, seed = settings["stats_window_size"], settings["seed"]
    require(1 <= window <= MOST, "stats_window_size", window, f"between 1 and {MOST}")
    require(seed is None or 0 <= seed < 2**31, "seed", seed, "between 0 and 2^31, or None")


@dataclass(frozen=True)
class RegularizationConfig(Settings, prefix="regularization"):
    """Weights of what keeps the policy near the pretrained one; 0 leaves a term out.

    Attributes:
        wasserstein: squared distance to the pretrained flow's chunk from the same x_0.
        behaviour_cloning: the pretraining loss on demonstrations.
        demonstrations: store of them; None takes the task's own.
    """

    wasserstein: NonNegativeFloat = 0.0
    behaviour_cloning: NonNegativeFloat = 0.0
    demonstrations: str | None = None


@dataclass(frozen=True)
class SelfDistillationConfig(Settings, prefix="distill"):
    """Self-distillation: the tuned policy's own chunks re-teach it the other K.

    Attributes:
        steps: optimiser steps; 0 leaves it out, and the checkpoint is then for the tuned K alone.
        batch_size: observations of a step.
        learning_rate: peak; it falls to nothing along a cosine.
        ema_decay: of the weights' average that is kept.
    """

    steps: NonNegativeInt = 0
    batch_size: Annotated[int, at_least(4)] = 256
    learning_rate: PositiveFloat = 3e-4
    ema_decay: BelowOne = 0.995


@dataclass(frozen=True)
class OnlineConfig(Settings):
    """What every kind of fine-tuning run depends on.

    Attributes:
        env: the task's settings.
        checkpoint: the pretrained policy.
        num_steps: K; None takes the one that the checkpoint is tuned for, or 4.
        grid: ``name`` and settings of the chain's grid of flow times; None takes the one it was
            tuned for, or else the uniform one.
        action_clip: bound of the sampled actions in normalised units, which the tuned policy keeps; None
            takes the checkpoint's. Beyond it the flow has no gradient.
        total_steps: environment steps, over all processes.
        num_envs: environments, over all processes.
        stagger: cut the first episode of each environment short, each at another length, so that they do
            not run in step where episodes end by their time limit alone.
        workers: processes that simulate, or threads where the task has native chunks; 0 simulates in the
            learner's own, None takes one per core.
        distill: self-distillation at the end.
        evaluate_every: environment steps between evaluations as deployed; 0 is only before and after.
        evaluate_episodes: episodes of an evaluation on the way.
        final_episodes: episodes of the evaluations before and after, on the same seeds; 0 skips both.
        evaluation_envs: environments stepped side by side in evaluation.
        save_every: iterations between saved states.
        loggers: any of ``csv``, ``tensorboard``, ``wandb``.
        wandb: keyword arguments of ``wandb.init``; without an account it stays offline.
        threads: CPU threads of torch; None leaves its choice.
        seed: of everything random.
        device: ``auto`` takes a GPU where there is one.
        resume: continue the run in ``run_dir``.
        video: episodes to record before and after, side by side; true records one, false none.
    """

    env: dict[str, Any]
    checkpoint: str
    num_steps: PositiveInt | None = None
    grid: dict[str, Any] | None = None
    action_clip: PositiveFloat | None = None
    total_steps: PositiveInt = 1_000_000
    num_envs: PositiveInt = 16
    stagger: bool = False
    workers: NonNegativeInt | None = None
    distill: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    evaluate_every: NonNegativeInt = 0
    evaluate_episodes: PositiveInt = 20
    final_episodes: NonNegativeInt = 100
    evaluation_envs: PositiveInt = 50
    save_every: PositiveInt = 1
    loggers: tuple[Annotated[str, one_of(LOGGERS)], ...] = ("csv",)
    wandb: dict[str, Any] = field(default_factory=dict)
    threads: PositiveInt | None = None
    seed: NonNegativeInt = 0
    device: str = "auto"
    resume: bool = False
    video: Episodes = True


@dataclass(frozen=True)
class FinetuneConfig(OnlineConfig):
    """Everything a run of ReinFlow depends on.

    Attributes:
        reinflow: of the algorithm.
        noise: of the injected noise.
        update: the update rule's ``name`` and its settings.
        advantages: their ``name`` and settings; None is ``gae``. ``gamma`` and ``gae_lambda`` are those of
            ``reinflow``.
        regularization: what keeps the policy near the pretrained one.
    """

    reinflow: ReinFlowConfig = field(default_factory=ReinFlowConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    update: dict[str, Any] = field(default_factory=dict)
    advantages: dict[str, Any] | None = None
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)

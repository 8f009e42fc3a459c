"""Settings of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.runs.loggers import LOGGERS
from flowpolicy.settings import require


@dataclass(frozen=True)
class ReinFlowConfig:
    """Settings of :class:`flowpolicy.finetuning.reinflow.ReinFlow`, which explains them and checks them.

    Attributes:
        final_learning_rate: share of ``learning_rate`` left at the end; it falls linearly.
    """

    n_steps: int = 128
    batch_size: int = 512
    n_epochs: int = 4
    learning_rate: float = 3e-4
    final_learning_rate: float = 1.0
    critic_learning_rate: float = 1e-3
    adaptive_rate: bool = True
    gamma: float = 0.995
    gae_lambda: float = 0.95
    target_kl: float | None = 0.15
    critic_warmup: int = 3
    max_grad_norm: float = 1.0
    critic_hidden: tuple[int, ...] = (256, 256)
    image_encoder: str = "frozen"
    critic_encoder: str = "shared"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, f"reinflow.{name}", getattr(self, name), "positive")
        share = self.final_learning_rate
        require(0 <= share <= 1, "reinflow.final_learning_rate", share, "in [0, 1]")
        require(self.critic_warmup >= 0, "reinflow.critic_warmup", self.critic_warmup, "at least 0")


MOST = 10_000_000
"""Chunks of a buffer or a minibatch, passes over it, episodes that are averaged."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse (ConfigError) keyword arguments of ReinFlow that are out of range."""
    for name in ("n_steps", "batch_size", "n_epochs", "stats_window_size"):
        require(1 <= settings[name] <= MOST, name, settings[name], f"at least 1 and at most {MOST:,}")
    hidden, kl, seed = settings["critic_hidden"], settings["target_kl"], settings["seed"]
    is_net = len(hidden) <= 16 and all(1 <= width <= 8192 for width in hidden)
    for name, is_allowed, allowed in (
        ("gamma", 0 < settings["gamma"] <= 1, "in (0, 1]"),
        ("gae_lambda", 0 <= settings["gae_lambda"] <= 1, "in [0, 1]"),
        ("target_kl", kl is None or kl > 0, "positive, or None"),
        ("image_encoder", settings["image_encoder"] in ("frozen", "trained"), "frozen or trained"),
        ("critic_encoder", settings["critic_encoder"] in ("shared", "own"), "shared or own"),
        ("critic_warmup", settings["critic_warmup"] >= 0, "0 or more"),
        ("max_grad_norm", settings["max_grad_norm"] > 0, "positive"),
        ("seed", seed is None or 0 <= seed < 2**31, "between 0 and 2^31, or None"),
        ("critic_hidden", is_net, "at most 16 widths between 1 and 8192"),
    ):
        require(is_allowed, name, settings[name], allowed)


@dataclass(frozen=True)
class RegularizationConfig:
    """Weights of what keeps the policy near the pretrained one; 0 leaves a term out.

    Attributes:
        wasserstein: squared distance to the pretrained flow's chunk from the same x_0.
        behaviour_cloning: the pretraining loss on demonstrations.
        demonstrations: store of them; None takes the task's own.
    """

    wasserstein: float = 0.0
    behaviour_cloning: float = 0.0
    demonstrations: str | None = None

    def __post_init__(self) -> None:
        for name in ("wasserstein", "behaviour_cloning"):
            require(getattr(self, name) >= 0, f"regularization.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True)
class DistillConfig:
    """Self-distillation: the tuned policy's own chunks re-teach it the other K.

    Attributes:
        steps: optimiser steps; 0 leaves it out, and the checkpoint is then for the tuned K alone.
        batch_size: observations of a step.
        learning_rate: peak; it falls to nothing along a cosine.
        ema_decay: of the weights' average that is kept.
    """

    steps: int = 0
    batch_size: int = 256
    learning_rate: float = 3e-4
    ema_decay: float = 0.995

    def __post_init__(self) -> None:
        require(self.steps >= 0, "distill.steps", self.steps, "at least 0")
        require(self.batch_size >= 4, "distill.batch_size", self.batch_size, "at least 4")
        require(self.learning_rate > 0, "distill.learning_rate", self.learning_rate, "positive")
        require(0 <= self.ema_decay < 1, "distill.ema_decay", self.ema_decay, "in [0, 1)")


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything a fine-tuning run depends on.

    Attributes:
        env: the task's settings.
        checkpoint: the pretrained policy.
        num_steps: K.
        action_clip: bound of the last transition's mean in normalised units, which the tuned policy keeps;
            None takes the checkpoint's. Beyond it the mean has no gradient.
        total_steps: environment steps, over all processes.
        num_envs: environments, over all processes.
        stagger: cut the first episode of each environment short, each at another length, so that they do
            not run in step where episodes end by their time limit alone.
        workers: processes that simulate; 0 simulates in the learner's own, None takes one per core.
        reinflow: of the algorithm.
        noise: of the injected noise.
        update: the update rule's ``name`` and its settings.
        regularization: what keeps the policy near the pretrained one.
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
    num_steps: int = 4
    action_clip: float | None = None
    total_steps: int = 1_000_000
    num_envs: int = 16
    stagger: bool = False
    workers: int | None = None
    reinflow: ReinFlowConfig = field(default_factory=ReinFlowConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    update: dict[str, Any] = field(default_factory=dict)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate_every: int = 0
    evaluate_episodes: int = 20
    final_episodes: int = 100
    evaluation_envs: int = 50
    save_every: int = 1
    loggers: tuple[str, ...] = ("csv",)
    wandb: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    video: bool | int = True

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "total_steps",
            "num_envs",
            "evaluate_episodes",
            "evaluation_envs",
            "save_every",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("evaluate_every", "final_episodes", "seed", "video"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "at least 0, or null")
        clip = self.action_clip
        require(clip is None or clip > 0, "action_clip", clip, "positive, or null")
        for name in self.loggers:
            require(name in LOGGERS, "loggers", name, f"any of {', '.join(LOGGERS)}")

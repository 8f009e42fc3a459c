"""A task small enough to train on in a test: demonstrations of a linear controller, shapes of Pendulum-v1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.evaluation.task import Task
from flowpolicy.pretraining.run import PretrainConfig, make_policy, make_samplers
from flowpolicy.pretraining.trainer import Trainer
from flowpolicy.settings import build

MODEL = {"width": 16, "depth": 1, "num_heads": 2, "tokens_per_step": 1}


def toy_demonstrations(episodes: int = 40, length: int = 20) -> Demonstrations:
    """Actions are a linear function of the observation, give or take 2%."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(episodes, 1, 3))
    drift = 0.02 * np.cumsum(rng.normal(size=(episodes, length, 3)), axis=1)
    observation = (start + drift).reshape(-1, 3).astype(np.float32)
    action = np.tanh(observation @ np.array([[0.8], [-0.5], [0.3]])) + 0.02 * rng.normal(
        size=(len(observation), 1)
    )
    arrays = {
        "observation": observation,
        "action": action.astype(np.float32),
        "reward": -np.abs(action[:, 0]).astype(np.float32),
    }
    return Demonstrations(arrays, np.arange(1, episodes + 1) * length)


def write_toy_store(path: Path) -> Path:
    return write_demonstrations(path, toy_demonstrations())


def toy_settings(policy: str = "flow_matching", store: Path | str = "", **train: Any) -> dict[str, Any]:
    """What ``pretrain`` takes."""
    return {
        "env": {"name": "toy", "env_id": "Pendulum-v1", "demonstrations": str(store), "control_hz": 20.0},
        "policy": {"name": policy},
        "model": dict(MODEL),
        "data": {"validation_fraction": 0.2},
        "train": {
            "steps": 40, "batch_size": 16, "warmup_steps": 5, "save_every": 10, "validate_every": 20,
            "log_every": 10, "final_episodes": 0, "threads": 1, **train,
        },
        "video": False,
        "device": "cpu",
    }  # fmt: skip


def toy_trainer(policy: str, run_dir: Path | None = None, *, dropout: float = 0.0, **changes: Any) -> Trainer:
    """A trainer on the toy demonstrations; ``changes`` go to the train settings but for the Trainer's own."""
    own = {
        key: changes.pop(key) for key in ("processes", "settings", "loggers", "evaluate") if key in changes
    }
    seed = changes.pop("seed", 0)
    settings = toy_settings(policy, **changes)
    settings["model"]["dropout"] = dropout
    config = build(PretrainConfig, settings, "config")
    task = Task("toy", "Pendulum-v1")
    torch.manual_seed(seed)
    demos = toy_demonstrations()
    made = make_policy(config, task, demos)
    training, validation = make_samplers(made, demos, config.data, seed)
    return Trainer(made, training, validation, config.train, run_dir=run_dir, seed=seed, **own)

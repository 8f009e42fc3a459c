"""What files of earlier versions give when they are read, which every later version must find again."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from questions import ROWS, Question

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.caching.schedule import Schedule, fingerprint
from flowpolicy.acceleration.choosing.plan import DeploymentPlan
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.data.store import read_demonstrations

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NUMBERS = HERE / "numbers.json"

SCHEDULES = {
    "schedules/hopper-shortcut-seed0.json": "benchmarks/checkpoints/hopper-shortcut-seed0",
    "schedules/pusht-flow_matching-seed0.json": "benchmarks/checkpoints/pusht-flow_matching-seed0",
    "plan/cached.json": "tests/existing_files/images",
}
"""Cache schedule, here -> the checkpoint that it was made for."""

QUIET = ["seed=0", "device=cpu", "video=0"]
UNFINISHED = {
    "pretraining": [
        "pretrain", "env=hopper", "model.width=16", "model.depth=1", "model.num_heads=2", "train.steps=20",
        "train.batch_size=16", "train.warmup_steps=0", "train.learning_rate=0.01", "train.save_every=10",
        "train.ema_decay=0.9", "train.final_episodes=0", "train.threads=1", *QUIET,
    ],
    "finetuning": [
        "finetune-reinflow", "env=hopper", "checkpoint=tests/existing_files/pretraining/checkpoint",
        "num_steps=2", "total_steps=128", "num_envs=2", "workers=0", "reinflow.n_steps=8",
        "reinflow.batch_size=16", "reinflow.critic_warmup=0", "reinflow.target_kl=null",
        "reinflow.critic_hidden=[16]", "noise.hidden=16", "final_episodes=0", "threads=1", *QUIET,
    ],
}  # fmt: skip
"""Run folder, here -> the command that made it until it was stopped halfway."""


def chunk_of(policy: Any, question: Question) -> NDArray[np.float32]:
    """Chunks ``(B, T, A)`` of a policy, or of a sampler, as it samples by default."""
    chunk: NDArray[np.float32] = policy.act(question.observations, noise=question.noise).numpy()
    return chunk


def checkpoint(name: str) -> dict[str, Any]:
    """The chunk of a checkpoint, and the hash that cache schedules and plans know it by."""
    folder = ROOT / name
    policy = FlowPolicy.load(folder)
    chunk = chunk_of(policy, Question.of_checkpoint(folder))
    return {"fingerprint": fingerprint(policy), "chunk": chunk}


def schedule(name: str) -> dict[str, Any]:
    """The chunk of a checkpoint sampled as a cache schedule says."""
    folder, cached = ROOT / SCHEDULES[name], Schedule.load(HERE / name)
    key = cached.key
    sampler = build_sampler(
        FlowPolicy.load(folder),
        batch_size=ROWS,
        num_steps=key.num_steps,
        solver=key.solver,
        schedule=cached,
    )
    chunk = chunk_of(sampler, Question.of_checkpoint(folder))
    return {"method": cached.method, "share": cached.share, "chunk": chunk}


def plan(name: str) -> dict[str, Any]:
    """What a plan says; whether it holds here is another question."""
    found = DeploymentPlan.load(HERE / name)
    says = {key: getattr(found, key) for key in PLAN}
    for role in ("sampler", "fast"):
        chosen = getattr(found, role)
        sampling = {key: getattr(chosen.sampling, key) for key in SAMPLING}
        says[role] = sampling | {key: getattr(chosen, key) for key in MEASURED}
    return says


PLAN = (
    "fingerprint", "hardware", "period_ms", "quantile", "max_action_error", "device", "threads",
    "execute_horizon", "rollouts", "reason", "delay_ticks",
)  # fmt: skip
SAMPLING = ("num_steps", "solver", "backend", "schedule", "dtype")
MEASURED = (
    "share",
    "nfe",
    "latency_ms",
    "action_error",
    "action_error_bound",
    "largest_action_error",
)


def model(name: str) -> dict[str, Any]:
    """What a ReinFlow model predicts, the chunk of the policy it deploys, and how far it had come."""
    from flowpolicy.finetuning.reinflow import ReinFlow

    found = ReinFlow.load(HERE / name, device="cpu")
    question = Question.of_model(HERE / name)
    rows = {key: value[:, -1] for key, value in question.observations.items()}
    torch.manual_seed(0)  # x_0 of a prediction comes from the global generator
    actions, _ = found.predict(rows, deterministic=True)
    deployed = chunk_of(found.deployed_policy(), question)
    progress = {"iteration": found.iteration, "num_timesteps": found.num_timesteps}
    return {"prediction": actions, "chunk": deployed, **progress}


def store(name: str) -> dict[str, Any]:
    """Each array of a demonstration store in three words: type, shape and sum."""
    demos = read_demonstrations(ROOT / name)
    arrays = {**demos.arrays, "episode_ends": demos.episode_ends}
    summed = {
        key: [str(array.dtype), list(array.shape), float(np.asarray(array, np.float64).sum())]
        for key, array in sorted(arrays.items())
    }
    return {"arrays": summed, "attributes": demos.attributes}


def unfinished(name: str, folder: Path, python: str = sys.executable) -> dict[str, Any]:
    """The chunk of the policy that an interrupted run ends with, when a copy of it goes on in ``folder``."""
    shutil.copytree(HERE / name, folder)
    flowpolicy(python, *UNFINISHED[name], f"run_dir={folder}", "resume=true")
    done = folder / "checkpoint"
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    return {"chunk": chunk_of(FlowPolicy.load(done), Question.of_checkpoint(done)), "steps": steps}


def flowpolicy(python: str, *words: str) -> None:
    """Run the command as a user does."""
    done = subprocess.run(
        [python, "-P", "-m", "flowpolicy", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

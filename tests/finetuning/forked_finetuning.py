"""Started by test_finetuning_processes.py: runs that are killed and resumed, and a run of two processes.

    python forked_finetuning.py FOLDER SEED

Kills a run of each kind at random moments and lets it end, then takes a policy step with one and with two
processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from forked_runs import alone_and_in_two, finish, fork, main
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import save_file
from stable_baselines3.common.env_util import make_vec_env
from toy_practice import Reach, make, make_policy

from flowpolicy import FlowPolicy
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.offpolicy.run import finetune_offpolicy
from flowpolicy.finetuning.recorder import STATE_FILE
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.run import finetune
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.runs.distributed import Processes, processes

PER_ITERATION = 128
REINFLOW = {"reinflow": {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "critic_warmup": 0}}
OFFPOLICY = {
    "algorithm": {"name": "dsrl", "proposals": 2, "actor_hidden": [8]}, "save_every": 1,
    "offpolicy": {
        "learning_starts": 1, "train_freq": 16, "utd": 0.2, "batch_size": 8, "members": 2,
        "critic_hidden": [8],
    },
}  # fmt: skip
RUNS: dict[str, tuple[Any, Any, dict[str, Any], int, int]] = {
    "run": (finetune, ReinFlow, REINFLOW, 5, 4_096),
    "offpolicy": (finetune_offpolicy, OffPolicy, OFFPOLICY, 2, 2_560),
}
"""Folder -> how it is run, its model, its settings, how often it is killed, and its steps."""


def pendulum_settings(folder: Path) -> dict[str, Any]:
    """A run of iterations of 32 chunks of four steps, on Pendulum."""
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    torch.manual_seed(0)
    config = PolicyConfig({"name": "shortcut"}, model, {"observation": (3,)}, 1, 1, 4, 4)
    FlowPolicy(config).save(folder / "pretrained")
    task = {"name": "pendulum", "env_id": "Pendulum-v1"}
    return {
        "env": task, "checkpoint": str(folder / "pretrained"), "num_steps": 2,
        "num_envs": 2, "workers": 0, "final_episodes": 0, "video": False,
        "resume": True,
    }  # fmt: skip


def kill_and_resume(folder: Path, seed: int) -> dict[str, object]:
    FigureCanvasAgg.print_png = lambda self, path: Path(path).write_bytes(b"")  # type: ignore[method-assign]
    common = pendulum_settings(folder)
    finetune({**common, **REINFLOW, "total_steps": 1}, folder / "first")  # so that no child imports it again
    return {name: kill_and_resume_run(folder / name, common, seed) for name in RUNS}


def kill_and_resume_run(run_dir: Path, common: dict[str, Any], seed: int) -> dict[str, object]:
    run, model, own, kills, steps = RUNS[run_dir.name]
    settings, rng = {**common, **own, "total_steps": steps}, random.Random(seed)
    saved: list[int] = []

    def saved_steps() -> int:
        state = run_dir / STATE_FILE
        return model.load(state).num_timesteps if state.exists() else 0

    for number in range(kills):
        child = fork(lambda: run(settings, run_dir))
        start, goal = saved_steps(), rng.randint(1, 5)
        metrics = run_dir / "metrics.csv"
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        while (number and not metrics.exists()) or (
            metrics.exists() and len(metrics.read_text().splitlines()) < before + goal
        ):
            time.sleep(0.004)
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit("the run was over before it was killed")
        time.sleep(rng.uniform(0.0, 0.03 if number else 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rows = metrics.read_text().splitlines()[1:] if metrics.exists() else []
        logged = [int(float(row.split(",")[0])) for row in rows if row.count(",") > 3]
        saved.append(saved_steps())
        assert saved[-1] >= start, "a resumed run went back"
        # What was logged and not saved is at most the iteration in which it was killed.
        assert not logged or saved[-1] >= logged[-1] - PER_ITERATION, (saved, logged[-1])
    summary: list[Path | None] = []
    finish(fork(lambda: summary.append(run(settings, run_dir))))
    return {"saved": saved, "steps": json.loads((run_dir / "summary.json").read_text())["steps"]}


def ranks(folder: Path) -> None:
    def finetune(name: str) -> None:
        torch.set_num_threads(1)
        with processes() as group:
            model = make(
                make_vec_env(Reach, n_envs=4 // group.count, seed=7), make_policy(), batch_size=64,
                processes=group, target_kl=None, learning_rate=1e-2,
            )  # fmt: skip
            # One minibatch, of which each process has its part.
            batch = whole_batch()[torch.arange(64).chunk(group.count)[group.rank]]
            model.learner.policy_step(batch)
            model.learner.critic_step(batch)
            gradients = {
                f"gradient.{key}": parameter.grad
                for key, parameter in model.actor_critic.named_parameters()
                if parameter.grad is not None
            }
            model.learn(1)
            state = {f"learned.{key}": value for key, value in model.actor_critic.state_dict().items()}
            counts = {"count": torch.tensor([model.num_timesteps, model.scale.count])}
            tensors = {key: value.clone().contiguous() for key, value in (gradients | state | counts).items()}
            save_file(tensors, folder / f"{name}-{group.rank}")

    alone_and_in_two(finetune)


def whole_batch() -> Any:
    """64 chunks of fine-tuning, the same in every process."""
    model = make(make_vec_env(Reach, n_envs=4, seed=7), processes=Processes())
    batches: list[Any] = []
    model.learner.policy_step = lambda batch: (batches.append(batch), ({"train/kl": 0.0}, False))[1]  # type: ignore[method-assign]
    model.batch_size = 64
    model.learn(1)
    return batches[0]


if __name__ == "__main__":
    main(kill_and_resume, ranks)

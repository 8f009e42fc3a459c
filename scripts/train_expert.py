"""Train a task's expert: python scripts/train_expert.py env=hopper."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.errors import TaskError
from flowpolicy.evaluation.summary import versions, write_summary
from flowpolicy.evaluation.task import task_from
from flowpolicy.optional import optional
from flowpolicy.settings import build, require


@script("train_expert")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Train, then write the last checkpoint's return."""
    with optional("Training an expert needs {name}", "rl", TaskError):
        import torch

        from flowpolicy_envs.actor import ExpertActor
        from flowpolicy_envs.experts import ExpertConfig, train_expert

    env = config["env"]
    task_from(env).simulator()
    if env.get("expert") is None:
        raise TaskError(f"Task '{env['name']}' has no recipe for an expert; add env.expert to its YAML file.")
    seed, threads = config["seed"], config["threads"]
    require(isinstance(seed, int) and seed >= 0, "seed", seed, "an integer of at least 0")
    require(isinstance(threads, int) and threads >= 1, "threads", threads, "an integer of at least 1")
    torch.set_num_threads(threads)
    recipe = build(ExpertConfig, env["expert"], "env.expert")
    start = time.time()
    actors = train_expert(
        env["env_id"],
        recipe,
        run_dir,
        seed=seed,
        resume=config["resume"],
        progress_bar=sys.stderr.isatty(),
        command=command_line(),
        versions=versions(),
        env_kwargs=env["env_kwargs"],
    )
    last = max(actors.glob("step_*.safetensors"))
    info = ExpertActor.load(last).info
    summary = write_summary(
        run_dir,
        task=env["name"],
        policy=f"expert:{recipe.algorithm}",
        seed=seed,
        steps=info.steps,
        wall_seconds=time.time() - start,
        metrics={"return_mean": info.return_mean, "return_std": info.return_std},
        checkpoint=str(last),
        command=command_line(),
    )
    print(summary)


if __name__ == "__main__":
    main()

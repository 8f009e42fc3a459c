"""Evaluate a checkpoint in its task: python scripts/evaluate.py checkpoint=PATH num_steps=4 episodes=100."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.evaluation.sweep import EvaluationConfig, evaluate_sweep
from flowpolicy.settings import build


@script("evaluate")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Run the episodes, print the table, write everything beside it."""
    start = time.time()
    env = config.pop("env", None)
    config.pop("run_dir", None)
    settings = build(EvaluationConfig, config, "")
    found = evaluate_sweep(settings, run_dir, env)
    print(found.table())
    files = found.write(run_dir)
    video = found.results[found.num_steps].video
    summary = write_summary(
        run_dir,
        task=found.task.name,
        policy=found.policy,
        seed=settings.seed,
        steps=found.train_steps,
        wall_seconds=time.time() - start,
        metrics=found.metrics(),
        checkpoint=settings.checkpoint,
        command=command_line(),
        files=[str(file) for file in files],
        video=video,
    )
    if video is not None:
        print(video)
    print(summary)


if __name__ == "__main__":
    main()

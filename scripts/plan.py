"""Choose the sampler that keeps a deadline here: python scripts/plan.py checkpoint=PATH period_ms=20."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.acceleration.choosing.choose import plan_checkpoint
from flowpolicy.acceleration.choosing.config import PlanConfig
from flowpolicy.cli import command_line, script
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.settings import build


@script("plan")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Measure, choose, explain, and write the plan."""
    start = time.time()
    env = config.pop("env", None)
    del config["run_dir"]
    settings = build(PlanConfig, config, "")
    found = plan_checkpoint(settings, env)
    print(found.table())
    files = found.write(run_dir)
    summary = write_summary(
        run_dir,
        task=found.task.name,
        policy="plan",
        seed=settings.seed,
        steps=settings.calls,
        wall_seconds=time.time() - start,
        metrics={"reason": found.reason, "rollouts": found.plan.rollouts},
        checkpoint=settings.checkpoint,
        command=command_line(),
        files=[str(file) for file in files],
    )
    for file in files:
        print(file)
    print(summary)


if __name__ == "__main__":
    main()

"""Time a policy's samplers: python scripts/benchmark_latency.py checkpoint=PATH num_steps=[1,4]."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.acceleration.latency import LatencyConfig, benchmark_checkpoint
from flowpolicy.cli import command_line, script
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.settings import build


@script("benchmark_latency")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Build, time, print the table, write JSON and plot."""
    start = time.time()
    env = config.pop("env", None)
    del config["run_dir"]
    settings = build(LatencyConfig, config, "")
    report = benchmark_checkpoint(settings, env)
    print(report.table())
    files = report.write(run_dir)
    summary = write_summary(
        run_dir,
        task=report.task,
        policy="samplers",
        seed=settings.seed,
        steps=settings.calls,
        wall_seconds=time.time() - start,
        metrics=report.content(),
        checkpoint=settings.checkpoint,
        command=command_line(),
        files=[str(file) for file in files],
    )
    print(files[-1])
    print(summary)


if __name__ == "__main__":
    main()

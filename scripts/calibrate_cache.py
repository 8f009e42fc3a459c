"""Make cache schedules: python scripts/calibrate_cache.py checkpoint=PATH num_steps=100 updates=10."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.acceleration.caching.calibration import CalibrationConfig, calibrate_checkpoint
from flowpolicy.cli import command_line, script
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.settings import build


@script("calibrate_cache")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Calibrate, print the table, write schedules, pictures and matrices."""
    start = time.time()
    env = config.pop("env", None)
    del config["run_dir"]
    settings = build(CalibrationConfig, config, "")
    found, task = calibrate_checkpoint(settings, env)
    print(found.table())
    files = found.write(run_dir)
    summary = write_summary(
        run_dir,
        task=task,
        policy=found.schedules[found.chosen].method,
        seed=settings.seed,
        steps=found.schedules[found.chosen].key.num_steps,
        wall_seconds=time.time() - start,
        metrics=found.metrics(),
        checkpoint=settings.checkpoint,
        command=command_line(),
        files=[str(file) for file in files],
    )
    print(files[0])
    print(summary)


if __name__ == "__main__":
    main()

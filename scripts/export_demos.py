"""Write demonstrations as a robomimic HDF5 file: python scripts/export_demos.py path=STORE out=FILE.hdf5."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.store_writing import check_new
from flowpolicy.evaluation.summary import write_summary


@script("export_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Read, check, write."""
    start = time.time()
    check_new(config["out"])
    demos = import_demonstrations(config["path"], config["format"])
    out = write_robomimic(
        config["out"],
        demos,
        env_args=config["env_args"],
        validation_fraction=config["validation_fraction"],
        seed=config["seed"],
    )
    summary = write_summary(
        run_dir,
        task=str(demos.attributes.get("task", "unknown")),
        policy="demonstrations",
        seed=config["seed"],
        steps=demos.num_steps,
        wall_seconds=time.time() - start,
        metrics={"episodes": demos.num_episodes, "file": str(out)},
        checkpoint=None,
        command=command_line(),
    )
    print(summary)


if __name__ == "__main__":
    main()

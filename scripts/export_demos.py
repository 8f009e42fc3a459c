"""Write demonstrations for robomimic or LeRobot: python scripts/export_demos.py path=STORE out=NAME."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.lerobot_writing import write_lerobot
from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.store import Demonstrations
from flowpolicy.data.store_writing import check_new
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.settings import choose


@script("export_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Read, check, write."""
    start = time.time()
    write = choose({"robomimic": _robomimic, "lerobot": _lerobot}, config["format"], "format")
    check_new(config["out"])
    demos = import_demonstrations(config["path"], config["source_format"])
    out = write(demos, config)
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


def _robomimic(demos: Demonstrations, config: dict[str, Any]) -> Path:
    return write_robomimic(
        config["out"],
        demos,
        env_args=config["env_args"],
        validation_fraction=config["validation_fraction"],
        seed=config["seed"],
    )


def _lerobot(demos: Demonstrations, config: dict[str, Any]) -> Path:
    return write_lerobot(
        config["out"], demos, images=config["images"], fps=config["fps"], task=config["task"]
    )


if __name__ == "__main__":
    main()

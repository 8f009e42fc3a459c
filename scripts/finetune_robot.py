"""Fine-tune a policy on a robot: `python scripts/finetune_robot.py checkpoint=PATH env=hopper`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, conclude, script
from flowpolicy.errors import TaskError
from flowpolicy.optional import optional
from flowpolicy.settings import build


@script("finetune_robot")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Control, learn, and say where the policy is."""
    with optional("Fine-tuning needs {name}", "train,rl", TaskError):
        from flowpolicy.control.finetuning.config import RobotFinetuningConfig
        from flowpolicy.control.finetuning.run import finetune_robot
    env = config.pop("env", None)
    del config["run_dir"]
    run = finetune_robot(build(RobotFinetuningConfig, config, ""), run_dir, command_line(), env)
    conclude(run, run_dir / "checkpoint")


if __name__ == "__main__":
    main()

"""Control a robot in real time: python scripts/run_control.py checkpoint=PATH robot=mujoco env=hopper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.control.run import RunConfig, run_control
from flowpolicy.settings import build


@script("run_control")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Drive, report, and say where everything is."""
    env = config.pop("env", None)
    del config["run_dir"]
    run = run_control(build(RunConfig, config, ""), run_dir, command_line(), env)
    print(run.table())
    for file in run.files:
        print(file)
    print(run_dir / "summary.json")
    if run.signal:
        raise SystemExit(128 + run.signal)


if __name__ == "__main__":
    main()

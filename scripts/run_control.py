"""Control a robot in real time: python scripts/run_control.py checkpoint=PATH robot=mujoco env=hopper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, conclude, script
from flowpolicy.control.run import run_control
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.served import Connect
from flowpolicy.optional import optional
from flowpolicy.settings import build


@script("run_control")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Drive, report, and say where everything is."""
    env = config.pop("env", None)
    del config["run_dir"]
    config["checkpoint"] = config["checkpoint"] or ""
    settings = build(RunConfig, config, "")
    run = run_control(settings, run_dir, command_line(), env, connect=_connector(settings))
    conclude(run, run_dir / "summary.json")


def _connector(settings: RunConfig) -> Connect | None:
    """Connects to the policy's server, where there is one."""
    if settings.policy_server is None:
        return None
    with optional("policy_server= needs {name}", "serve"):
        from flowpolicy.serving.remote import RemotePolicy
    return RemotePolicy


if __name__ == "__main__":
    main()

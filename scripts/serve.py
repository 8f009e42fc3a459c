"""Serve a policy over a websocket: python scripts/serve.py checkpoint=PATH port=8000."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.errors import ConfigError
from flowpolicy.settings import build


@script("serve")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Serve until Ctrl-C, then say how it went and where that is written."""
    try:
        from flowpolicy.serving.run import ServeConfig, serve_checkpoint
    except ImportError as error:  # in one sentence
        raise ConfigError(str(error)) from error

    del config["run_dir"]
    statistics = serve_checkpoint(build(ServeConfig, config, ""), run_dir, command_line())
    print(statistics.line())
    print(run_dir / "summary.json")


if __name__ == "__main__":
    main()

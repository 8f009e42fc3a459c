"""Pretrain a policy on demonstrations: `python scripts/pretrain.py env=hopper policy=shortcut`."""

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.pretraining.run import pretrain


@script("pretrain")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Train, evaluate, and say where the results are."""
    summary = pretrain(config, run_dir, command=command_line())
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    main()

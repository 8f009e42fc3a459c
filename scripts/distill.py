"""Distil a flow policy to one or two steps: `python scripts/distill.py checkpoint=TEACHER method=direct`."""

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.distillation.run import distill


@script("distill")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Make the pairs, train, evaluate, and say where the results are."""
    summary = distill(config, run_dir, command=command_line())
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    main()

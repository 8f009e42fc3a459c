"""Fine-tune by preferences: `python scripts/finetune_preferences.py checkpoint=PATH pairs=STORE`."""

from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.preferences.run import finetune_preferences


@script("finetune_preferences")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Label, train, evaluate, and say where the results are."""
    summary = finetune_preferences(config, run_dir, command=command_line())
    if summary is not None:
        print(summary)


if __name__ == "__main__":
    main()

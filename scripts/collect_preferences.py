"""Collect pairs of segments of a policy: `python scripts/collect_preferences.py checkpoint=PATH`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.preferences.collection import CollectionConfig, collect_preferences
from flowpolicy.settings import build


@script("collect_preferences")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Play the pairs, and say where they are."""
    start = time.time()
    env = config.pop("env", None)
    del config["run_dir"]
    settings = build(CollectionConfig, config, "")
    path, task = collect_preferences(settings, env)
    summary = write_summary(
        run_dir,
        task=task.name,
        policy="pairs",
        seed=settings.seed,
        steps=settings.pairs,
        wall_seconds=time.time() - start,
        metrics={"store": str(path)},
        checkpoint=settings.checkpoint,
        command=command_line(),
    )
    print(path)
    print(summary)


if __name__ == "__main__":
    main()

"""Roll experts out into a store: python scripts/collect_demos.py env=hopper level=medium."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.errors import TaskError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.optional import optional


@script("collect_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Collect, check the band, write the store."""
    with optional("Collecting needs {name}", "train,mujoco", TaskError):
        from flowpolicy_envs.collection import collect_store

    start = time.time()
    keys = (
        "level",
        "actors",
        "actors_dir",
        "steps",
        "episodes",
        "num_envs",
        "workers",
        "deterministic",
        "allow_outside_band",
        "seed",
        "image_codec",
        "out",
    )
    path, demos = collect_store(config["env"], **{key: config[key] for key in keys}, command=command_line())
    metrics = {
        key: demos.attributes[key]
        for key in ("return_mean", "return_std", "success_rate")
        if key in demos.attributes
    }
    summary = write_summary(
        run_dir,
        task=config["env"]["name"],
        policy=f"demonstrator:{demos.attributes['level']}",
        seed=config["seed"],
        steps=demos.num_steps,
        wall_seconds=time.time() - start,
        metrics={**metrics, "episodes": demos.num_episodes, "store": str(path)},
        checkpoint=None,
        command=command_line(),
    )
    print(summary)


if __name__ == "__main__":
    main()

"""Roll experts or a policy out into a store: python scripts/collect_demos.py env=hopper level=medium."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.optional import optional
from flowpolicy.settings import require

SHARED = ("episodes", "num_envs", "seed", "image_codec", "out")
OF_EXPERTS = (
    "level", "actors", "actors_dir", "steps", "workers", "deterministic", "allow_outside_band",
)  # fmt: skip
OF_A_POLICY = ("num_steps", "only_successes", "device")


@script("collect_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Collect, check the band, write the store."""
    with optional("Collecting needs {name}", "train,mujoco", TaskError):
        from flowpolicy_envs.collection import collect_store
        from flowpolicy_envs.policy_collection import collect_policy_store

    start = time.time()
    env, checkpoint = config.get("env"), config["checkpoint"]
    shared = {key: config[key] for key in SHARED} | {"command": command_line()}
    if checkpoint is not None:
        require(config["level"] is None, "level", config["level"], "left out beside checkpoint")
        path, demos = collect_policy_store(
            checkpoint, env, **shared, **{key: config[key] for key in OF_A_POLICY}
        )
    elif not env or "name" not in env:
        raise ConfigError("No task is named; add env=NAME, or checkpoint=PATH, which names one.")
    else:
        for key in ("num_steps", "only_successes"):
            require(not config[key], key, config[key], "left out without checkpoint")
        path, demos = collect_store(env, **shared, **{key: config[key] for key in OF_EXPERTS})
    metrics = {
        key: demos.attributes[key]
        for key in ("return_mean", "return_std", "success_rate")
        if key in demos.attributes
    }
    summary = write_summary(
        run_dir,
        task=demos.attributes["task"],
        policy=demos.attributes.get("policy", f"demonstrator:{demos.attributes['level']}"),
        seed=config["seed"],
        steps=demos.num_steps,
        wall_seconds=time.time() - start,
        metrics={**metrics, "episodes": demos.num_episodes, "store": str(path)},
        checkpoint=checkpoint,
        command=command_line(),
    )
    print(summary)


if __name__ == "__main__":
    main()

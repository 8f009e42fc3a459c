"""Import other projects' demonstrations into a store: python scripts/import_demos.py source=FILE out=PATH."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.data.importers import import_to_store
from flowpolicy.data.inspection import inspect_demonstrations, metrics, table
from flowpolicy.evaluation.summary import write_summary


@script("import_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Read, bring to the task's keys, check, write, and show what was written."""
    start = time.time()
    env = config.get("env") or {}
    attributes = {"import_command": command_line(), **(config["attributes"] or {})}
    if env:
        attributes = {"env_id": env["env_id"], "fps": env["control_hz"], **attributes}
    out = import_to_store(
        config["source"],
        config["out"],
        config["format"],
        attributes=attributes,
        zarr_format=config["zarr_format"],
        image_codec=config["image_codec"],
        rename=config["rename"],
        concatenate=config["concatenate"],
        action=config["action"],
        kinds=config["kinds"],
        demo_transform=config["demo_transform"] or env.get("demo_transform"),
        keys=config["keys"],
        action_bounds=config["action_bounds"],
        out_of_bounds=config["out_of_bounds"],
        allow_gaps=config["allow_gaps"],
        continuous_quaternions=config["continuous_quaternions"],
        image_size=config["image_size"],
        every=config["every"],
        options=config["options"],
    )
    inspection = inspect_demonstrations(out)
    print(table(inspection))
    summary = write_summary(
        run_dir,
        task=env.get("name", "unknown"),
        policy="demonstrations",
        seed=0,
        steps=inspection.steps,
        wall_seconds=time.time() - start,
        metrics={**metrics(inspection), "store": str(out)},
        checkpoint=None,
        command=command_line(),
    )
    print(summary)


if __name__ == "__main__":
    main()

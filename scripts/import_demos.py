"""Import other projects' demonstrations into a store: python scripts/import_demos.py source=FILE out=PATH."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.data.importers import import_to_store
from flowpolicy.data.inspection import Inspection, inspect_demonstrations, metrics, table
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.evaluation.task_file import task_file_of, write_task_file


@script("import_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Read, bring to the task's keys, check, write, and show what was written, its task's file too."""
    start = time.time()
    env = config.get("env") or {}
    attributes = {"import_command": command_line(), **(config["attributes"] or {})}
    if env:
        if "env_id" not in env:
            raise ConfigError("Name the task whose settings these are, such as env=pusht.")
        about = {"env_id": env["env_id"], "fps": env["control_hz"]}
        attributes = {**{name: value for name, value in about.items() if value is not None}, **attributes}
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
    if inspection.problem is None and not env and config["task_file"] is not False:
        _write_task(inspection, Path(config["task_file"] or task_file_of(out)), out)
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


def _write_task(inspection: Inspection, path: Path, store: Path) -> None:
    """Leave the store's task beside it, and a file that is there already as it is."""
    log = logging.getLogger(__name__)
    if path.exists():
        log.warning("%s is there already and stays as it is; remove it to have it written anew.", path)
        return
    print(write_task_file(path, inspection, store))
    if "fps" not in inspection.attributes:
        log.warning("The recording declares no rate; write control_hz into %s before you train.", path)
    log.info("To train on it: flowpolicy pretrain env=%s", path)


if __name__ == "__main__":
    main()

"""Inspect demonstrations before training on them: python scripts/inspect_demos.py path=STORE."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from flowpolicy.cli import command_line, script
from flowpolicy.data.inspection import inspect_demonstrations, metrics, table
from flowpolicy.errors import DataError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.plots.demonstrations import draw_contact_sheet, draw_histograms


@script("inspect_demos")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Print the table, draw the pictures."""
    start = time.time()
    inspection = inspect_demonstrations(config["path"], config["format"])
    print(table(inspection))
    if config["plots"]:
        for path in draw_histograms(inspection, run_dir):
            print(path)
        try:
            print(draw_contact_sheet(inspection, run_dir / "contact_sheet.png"))
        except DataError as error:
            logging.getLogger(__name__).warning("%s", error)
    summary = write_summary(
        run_dir,
        task=inspection.attributes.get("env_id", "unknown"),
        policy="demonstrations",
        seed=0,
        steps=inspection.steps,
        wall_seconds=time.time() - start,
        metrics=metrics(inspection),
        checkpoint=None,
        command=command_line(),
    )
    print(summary)


if __name__ == "__main__":
    main()

"""Search solver and grid for a few evaluations: python scripts/search_solver.py checkpoint=PATH nfe=3."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flowpolicy.acceleration.solver_search import SearchConfig, search_checkpoint
from flowpolicy.cli import command_line, script
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.settings import build


@script("search_solver")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Search, print the table, write ``solver.json``."""
    start = time.time()
    env = config.pop("env", None)
    del config["run_dir"]
    settings = build(SearchConfig, config, "")
    search, task = search_checkpoint(settings, env)
    print(search.table())
    file = search.found.save(run_dir / "solver.json")
    summary = write_summary(
        run_dir,
        task=task,
        policy=str(search.found.sampling),
        seed=settings.seed,
        steps=search.found.sampling.steps,
        wall_seconds=time.time() - start,
        metrics=search.found.calibration,
        checkpoint=settings.checkpoint,
        command=command_line(),
        files=[str(file)],
    )
    print(file)
    print(summary)


if __name__ == "__main__":
    main()

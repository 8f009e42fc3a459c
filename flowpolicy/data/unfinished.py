"""What stands beside a store until it is whole: the folder it grows in, and a note of what is complete there.

A store ``<name>`` grows in ``.<name>.parts``. While it is written with a description of the work (the source,
what is asked of it), the note there says now and then how many rows are on disk, so that the same work goes
on from them after it was killed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowpolicy.errors import FlowPolicyError
from flowpolicy.files.reading import read_json

logger = logging.getLogger(__name__)

NOTE = "unfinished.json"


def folder_of(path: Path) -> Path:
    """Where the store that is to stand at ``path`` grows."""
    return path.with_name(f".{path.name}.parts")


def complete_rows(path: Path, work: Mapping[str, Any] | None) -> int:
    """Rows of every key that earlier, killed work of the same description left on disk.

    What it left is removed where it was other work, or none that can be gone on with.
    """
    folder = folder_of(path)
    try:
        found = read_json(folder / NOTE) if work is not None and (folder / NOTE).exists() else {}
        rows, earlier = int(found.get("rows", 0)), dict(found.get("work", {}))
    except (FlowPolicyError, TypeError, ValueError):  # cut off, or nothing of ours
        rows, earlier = 0, {}
    wanted = json_form(work or {})
    if rows > 0 and earlier == wanted:
        return rows
    if rows > 0:
        changed = [n for n in {**earlier, **wanted} if earlier.get(n) != wanted.get(n)]
        logger.warning(
            "What was written of %s before it was stopped differs in %s; it starts over.",
            path, ", ".join(changed),
        )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def json_form(work: Mapping[str, Any]) -> dict[str, Any]:
    """A description as it comes back from a JSON file."""
    form: dict[str, Any] = json.loads(json.dumps(work, default=str))
    return form

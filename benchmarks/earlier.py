"""Rows of a table whose runs were made elsewhere or are gone: the committed JSON is where they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flowpolicy.files.reading import read_json

RESULTS = Path(__file__).resolve().parent / "results"
ABOUT = ("versions", "machine", "date")


def with_earlier(
    name: str, content: dict[str, Any], runs_of: Callable[[dict[str, Any]], Iterable[str]]
) -> dict[str, Any]:
    """``content`` with the rows of ``benchmarks/results/<name>.json`` that rest on runs which are missing here.

    Of two rows with a run in common the one with more runs stays, of equals the new one. An earlier row says with which versions,
    on which machine and when it was measured.

    Args:
        runs_of: the names of a row's runs, as they stand in ``content["missing"]``; none for a row that is always made anew.
    """
    path, missing = RESULTS / f"{name}.json", set(content["missing"])
    if not missing or not path.exists():
        return content
    before, rows = read_json(path), list(content["rows"])
    about = {"measured": {key: before[key] for key in ABOUT if key in before}} if rows else {}
    for row in before["rows"]:
        runs = set(runs_of(row))
        same = [at for at, new in enumerate(rows) if runs & set(runs_of(new))]
        if runs & missing and all(len(runs) > len(set(runs_of(rows[at]))) for at in same):
            rows = [new for at, new in enumerate(rows) if at not in same] + [about | row]
            missing -= runs
    remaining = [run for run in content["missing"] if run in missing]
    base = content if content["rows"] else before | {"command": content["command"]}
    if "complete" in content:
        base = base | {"complete": not remaining}
    return base | {"rows": rows, "missing": remaining}

"""Rows of a table whose runs were made elsewhere or are gone: the committed JSON is where they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flowpolicy.files.reading import read_json

RESULTS = Path(__file__).resolve().parent / "results"
ABOUT = ("versions", "machine", "date")


def with_earlier(
    name: str,
    content: dict[str, Any],
    runs_of: Callable[[dict[str, Any]], Iterable[str]],
    every: Sequence[str],
) -> dict[str, Any]:
    """``content`` with the rows of ``benchmarks/results/<name>.json`` that rest on runs which are missing here.

    Of two rows with a run in common the one with more runs stays, of equals the new one. An earlier row says with
    which versions, on which machine and when it was measured.

    Args:
        runs_of: names of a row's runs, as they stand in ``content["missing"]``; none for a row that is always made anew.
        every: all of the benchmark's runs, in the order of the table.
    """
    path, missing, new = RESULTS / f"{name}.json", set(content["missing"]), content["rows"]
    if not missing or not path.exists():
        return content
    before = read_json(path)
    about = {"measured": {key: before[key] for key in ABOUT if key in before}} if new else {}
    kept = []
    for row in before["rows"]:
        runs = set(runs_of(row))
        rivals = [set(runs_of(each)) for each in new if runs & set(runs_of(each))]
        if runs & missing and all(len(rival) < len(runs) for rival in rivals):
            kept.append(about | row)
    found = {run for row in kept for run in runs_of(row)}
    rows = [row for row in new if not found & set(runs_of(row))] + kept
    places = {run: place for place, run in enumerate(every)}
    rows.sort(key=lambda row: min((places[run] for run in runs_of(row) if run in places), default=-1))
    remaining = [run for run in content["missing"] if run not in found]
    result = (content if new else before | {"command": content["command"]}) | {
        "rows": rows,
        "missing": remaining,
    }
    return result | ({"complete": not remaining} if "complete" in content else {})

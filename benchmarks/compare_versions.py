"""Two versions of the package, number by number and second by second, on this machine.

    python benchmarks/compare_versions.py --base PATH_OR_COMMIT        # this checkout against that one
    python benchmarks/compare_versions.py --base PATH --only numbers   # or speed, or a part of a row's name

`numbers`: pretraining and fine-tuning from fixed seeds (every logged metric, the weights, the chunks of the policy) and
every committed checkpoint of the base, sampled by both. `speed`: processes of both versions take turns; a ratio is the
base's seconds over the new one's in the same turn, so that above 1 the new one is faster, and its spread between two
checkouts of one version is the noise. What was measured of the same two commits before is kept; --again measures anew.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from version_numbers import RUNS, number_table, run_rows, sampling_rows
from version_processes import ROOT, Version, checkout
from version_speed import measures, speed_row, speed_table

from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

RESULT = ROOT / "benchmarks" / "results" / "compare-versions.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", required=True, help="a checkout of the other version, or a commit of this repository"
    )
    parser.add_argument("--only", default="", help="numbers, speed, or rows whose name contains this text")
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes, one after another")
    parser.add_argument("--seconds", type=float, default=20, help="that each pair takes turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with checkout(arguments.base) as root, tempfile.TemporaryDirectory() as temporary:
        compare(
            arguments,
            [Version("base", root, arguments.threads), Version("new", ROOT, arguments.threads)],
            Path(temporary),
        )


def compare(arguments: argparse.Namespace, both: list[Version], work: Path) -> None:
    """What is missing, one row after another; each is written down at once."""
    about = {version.name: version.state() for version in both}
    about["threads"] = arguments.threads
    before = read_json(arguments.output) if arguments.output.exists() else {}
    is_same = all(before.get(key) == value for key, value in about.items())
    found: dict[str, dict[str, Any]] = {"numbers": {}, "speed": {}}
    if is_same:
        found = {part: {row["what"]: row for row in before[part]} for part in found}

    def done(part: str, rows: list[dict[str, Any]]) -> None:
        print(time.strftime("%H:%M:%S"), *(row["what"] for row in rows), sep="  ", flush=True)
        found[part] |= {row["what"]: row for row in rows}
        content = {
            "command": f"python benchmarks/compare_versions.py --base {arguments.base}", **about,
            **{name: list(rows.values()) for name, rows in found.items()}, "machine": machine(),
            "versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(arguments.output, content)

    def is_wanted(part: str, name: str) -> bool:
        is_new = arguments.again or not any(what.startswith(name) for what in found[part])
        return is_new and (arguments.only == part or arguments.only in name)

    for number, run in enumerate(RUNS):
        if is_wanted("numbers", run.name):
            done("numbers", run_rows(run, both, _folder(work / f"run-{number}")))
    if is_wanted("numbers", "sampling"):
        done("numbers", sampling_rows(both, work))
    for measure in measures(both[0]):
        if is_wanted("speed", measure.name):
            done("speed", [speed_row(measure, both, arguments.processes, arguments.seconds, work)])
    print(number_table(list(found["numbers"].values())))
    print(speed_table(list(found["speed"].values())))
    print(arguments.output)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    main()

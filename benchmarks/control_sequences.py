"""Random sequences of faults through gate and loop: no limit broken on what the robot got, no action left out.

    python benchmarks/control_sequences.py                     # 100,000 sequences on two processes; writes the JSON
    python benchmarks/control_sequences.py --count 1000        # fewer: nothing is written

What a sequence is and what must hold of it is in tests/control/random_sequences.py, of which the tests run a few.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "control"))
COUNT, PART = 100_000, 500


def run_part(first: int) -> list[str]:
    from random_sequences import run_sequences

    return run_sequences(first, PART)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=COUNT, help="sequences, rounded up to 500")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    started, commit = time.monotonic(), git_state()[0]
    failures: list[str] = []
    done = 0
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for found in pool.imap(run_part, range(0, arguments.count, PART)):
            failures += found
            done += PART
            if done % 10_000 == 0 or found:
                print(
                    time.strftime("%H:%M:%S"),
                    f"{done} sequences, {len(failures)} failures",
                    *found,
                    flush=True,
                )
    content = {
        "command": "python benchmarks/control_sequences.py", "sequences": done, "seeds": [0, done - 1],
        "ticks_each": 25, "failures": failures, "seconds": time.monotonic() - started, "machine": machine(),
        "versions": versions(), "git_commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if arguments.count == COUNT:
        write_json(ROOT / "benchmarks" / "results" / "control-sequences.json", content)
    print(f"{done} sequences, {len(failures)} failures, {content['seconds']:.0f} s")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

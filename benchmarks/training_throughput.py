"""Training samples per second against Diffusion Policy's transformer, interleaved on one machine.

    python benchmarks/training_throughput.py --peer-checkout PATH --peer-python PATH --zarr PATH [--sizes 256x8]

Both train a velocity network on the 206 Push-T episodes (20-number state, T_o = 2, chunk 16) in float32 with the same
objective, width, depth, heads, dropout and batch size: ours with its own trainer, theirs with its own dataset,
loader (one worker process), normaliser, optimiser and EMA. Ours runs once for each number of actions that share a
token. The processes take turns, step for step; the ratio is the median over the rounds. A run that ends early
keeps the batch sizes that are done, and the same command goes on with the others; remove the result to measure anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowpolicy.evaluation.summary import machine
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "training-throughput.json"
PEER = "real-stanford/diffusion_policy TransformerForDiffusion, PushTLowdimDataset, DataLoader, EMAModel"


class Worker:
    """A process that trains a given number of steps on request and reports the time."""

    def __init__(self, python: str, script: str, settings: dict[str, Any], path: str = "") -> None:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if path:
            environment["PYTHONPATH"] = path
        command = [python, str(ROOT / "benchmarks" / "peers" / script), json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = json.loads(self._answer())

    def seconds(self, steps: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[1]} ended early")  # type: ignore[index]
        return line


def compare(settings: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of actions that share a token."""
    ours = {
        per_token: Worker(
            sys.executable, "flowpolicy_worker.py", {**settings, "actions_per_token": per_token}
        )
        for per_token in map(int, arguments.actions_per_token.split(","))
    }
    theirs = Worker(arguments.peer_python, "diffusion_policy_worker.py", settings, arguments.peer_checkout)
    workers, steps = (*ours.values(), theirs), arguments.steps
    for worker in workers:
        worker.seconds(3)
    rounds = [[worker.seconds(steps) for worker in workers] for _ in range(arguments.rounds)]
    for worker in workers:
        worker.close()
    samples = steps * settings["batch_size"]
    rows = []
    for number, (per_token, worker) in enumerate(ours.items()):
        ratios = sorted(turns[-1] / turns[number] for turns in rounds)
        row = {
            **{
                key: settings[key]
                for key in (
                    "width", "depth", "num_heads", "dropout", "batch_size", "action_horizon", "threads",
                    "precision",
                )
            },
            "actions_per_token": per_token,
            "parameters": worker.about["parameters"],
            "peer_parameters": theirs.about["parameters"],
            "samples_per_second": statistics.median(samples / turns[number] for turns in rounds),
            "peer_samples_per_second": statistics.median(samples / turns[-1] for turns in rounds),
            "ratio_median": statistics.median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
            "rounds": len(rounds),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{row['width']}x{row['depth']} batch {row['batch_size']}, {per_token} actions a token: "
            f"{row['samples_per_second']:.0f} against {row['peer_samples_per_second']:.0f} samples/s, ratio "
            f"{row['ratio_median']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-checkout", required=True, help="a checkout of real-stanford/diffusion_policy")
    parser.add_argument(
        "--peer-python", required=True, help="a Python with its requirements (zarr 2, numba, einops)"
    )
    parser.add_argument("--zarr", required=True, help="its Push-T store, unpacked")
    parser.add_argument("--store", default="demonstrations/pusht.zarr.zip", help="the same store, imported")
    parser.add_argument("--sizes", default="256x8", help="width x depth, comma-separated")
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--actions-per-token", default="1,2,4,8", help="ours, comma-separated")
    parser.add_argument("--precision", default="float32", help="ours: float32 | bfloat16 | auto")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    command = (
        "python benchmarks/training_throughput.py --peer-checkout PATH --peer-python PATH --zarr PATH "
        f"--sizes {arguments.sizes} --batches {arguments.batches} --actions-per-token "
        f"{arguments.actions_per_token} --precision {arguments.precision} --steps {arguments.steps} --rounds {arguments.rounds}"
    )
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = before["rows"] if before.get("command") == command else []
    for size in arguments.sizes.split(","):
        width, depth = map(int, size.split("x"))
        for batch in map(int, arguments.batches.split(",")):
            settings = {
                "zarr": arguments.zarr, "store": arguments.store, "width": width, "depth": depth, "num_heads": 4,
                "dropout": 0.01, "batch_size": batch, "action_horizon": 16, "threads": arguments.threads,
                "precision": arguments.precision,
            }  # fmt: skip
            if any((row["width"], row["depth"], row["batch_size"]) == (width, depth, batch) for row in rows):
                continue
            rows += compare(settings, arguments)
            content = {
                "command": command, "peer": PEER, "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": machine(), "rows": rows,
            }  # fmt: skip
            write_json(RESULT, content)


if __name__ == "__main__":
    main()

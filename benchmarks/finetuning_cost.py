"""What fine-tuning costs, against the published ReinFlow code on the same machine, interleaved.

    python benchmarks/finetuning_cost.py --checkout PATH [--peer-python PATH]

PATH is a checkout of ReinFlow/ReinFlow; see peers/reinflow_worker.py for what is patched. Both run Hopper's sizes, K = 4,
chunks of 4, as many parameters in the flow, on random observations; ours with each action as a token, and with the
chunk as one (--actions-per-token). Ratios are medians over interleaved rounds:

    rollout        seconds of inference per environment step, at 1, 16 and 40 environments
    update         seconds per unique transition (a chunk's denoising step): the whole update of an iteration, and
                   one pass (epoch) over it. The published sampler repeats every row ten times in an epoch; its own
                   other sampler, without repetition, is measured beside it.
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

from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"


class Worker:
    """A process that works so many times when told to, and says how long it took."""

    def __init__(self, python: str, script: str, settings: dict[str, Any]) -> None:
        command = [python, str(PEERS / script), json.dumps(settings)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(settings["threads"])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self.about: dict[str, Any] = json.loads(self._answer())

    def seconds(self, mode: str, times: int) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{mode} {times}\n")
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
            raise SystemExit(f"{self.process.args} ended early")
        return line


def rollout(arguments: argparse.Namespace, per_token: int, num_envs: int) -> dict[str, Any]:
    """Milliseconds of inference per environment step."""
    settings = _settings(arguments, per_token, num_envs, 2)
    ours = Worker(sys.executable, "flowpolicy_finetuning_worker.py", settings)
    theirs = Worker(arguments.peer_python, "reinflow_worker.py", _peer(arguments, num_envs, 2))
    for worker in (ours, theirs):
        worker.seconds("rollout", 10)
    calls = 30
    pairs = [
        (ours.seconds("rollout", calls), theirs.seconds("rollout", calls)) for _ in range(arguments.rounds)
    ]
    ours.close()
    theirs.close()
    steps = calls * num_envs * 4
    compared = _compared(pairs, 1000 / steps, 1000 / steps, "ms_per_environment_step")
    return {"actions_per_token": per_token, "num_envs": num_envs, **compared}


def update(arguments: argparse.Namespace, per_token: int, repeat: bool) -> list[dict[str, Any]]:
    """Milliseconds per unique transition, of a whole update and of one pass."""
    ours = Worker(
        sys.executable, "flowpolicy_finetuning_worker.py",
        _settings(arguments, per_token, 40, arguments.chunks),
    )  # fmt: skip
    settings = _peer(arguments, 40, arguments.chunks)
    if not repeat:
        settings |= {"repeat_samples": False, "minibatch": 512}
    theirs = Worker(arguments.peer_python, "reinflow_worker.py", settings)
    for worker in (ours, theirs):
        worker.seconds("update", 1)
    pairs = [(ours.seconds("update", 1), theirs.seconds("update", 1)) for _ in range(arguments.rounds)]
    ours.close()
    theirs.close()
    scales = [1000 / worker.about["unique_transitions"] for worker in (ours, theirs)]
    epochs = [worker.about["epochs"] for worker in (ours, theirs)]
    about = {"repeated_rows": repeat, "about": ours.about, "peer_about": theirs.about}
    whole = _compared(pairs, *scales, "ms_per_unique_transition")
    one = _compared(pairs, scales[0] / epochs[0], scales[1] / epochs[1], "ms_per_unique_transition")
    return [{"what": "update", **about, **whole}, {"what": "one epoch", **about, **one}]


def _compared(pairs: list[tuple[float, float]], scale: float, peer_scale: float, unit: str) -> dict[str, Any]:
    ratios = sorted(their * peer_scale / (our * scale) for our, their in pairs)
    return {
        unit: statistics.median(our * scale for our, _ in pairs),
        f"peer_{unit}": statistics.median(their * peer_scale for _, their in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "rounds": len(pairs),
    }


def _settings(arguments: argparse.Namespace, per_token: int, num_envs: int, chunks: int) -> dict[str, Any]:
    return {
        "actions_per_token": per_token,
        "num_envs": num_envs,
        "chunks": chunks,
        "width": arguments.width,
        "threads": arguments.threads,
    }


def _peer(arguments: argparse.Namespace, num_envs: int, chunks: int) -> dict[str, Any]:
    return {
        "checkout": arguments.checkout,
        "num_envs": num_envs,
        "chunks": chunks,
        "threads": arguments.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", required=True, help="a checkout of ReinFlow/ReinFlow")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="a Python with what the checkout imports"
    )
    parser.add_argument("--chunks", type=int, default=25, help="chunks of each of the 40 environments")
    parser.add_argument("--width", type=int, default=104, help="ours, for as many parameters as theirs")
    parser.add_argument("--actions-per-token", type=int, nargs="+", default=[1, 4], help="ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    tokens = arguments.actions_per_token
    content: dict[str, Any] = {
        "command": f"python benchmarks/finetuning_cost.py --checkout PATH --threads {arguments.threads}",
        "rollout": [rollout(arguments, each, count) for each in tokens for count in (1, 16, 40)],
        "update": [
            row for each in tokens for repeat in (True, False) for row in update(arguments, each, repeat)
        ],
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for row in content["rollout"]:
        print(
            f"{row['actions_per_token']} a token, rollout, {row['num_envs']:2d} environments: {row['ms_per_environment_step']:.4f} against "
            f"{row['peer_ms_per_environment_step']:.4f} ms a step, ratio {row['ratio_median']:.2f} "
            f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        )
    for row in content["update"]:
        print(
            f"{row['about']['actions_per_token']} a token, {row['what']}, their rows {'repeated' if row['repeated_rows'] else 'once'}: "
            f"{row['ms_per_unique_transition']:.3f} against {row['peer_ms_per_unique_transition']:.3f} ms per "
            f"unique transition, ratio {row['ratio_median']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]; "
            f"{row['about']['parameters']:,} and {row['peer_about']['parameters']:,} parameters"
        )
    write_json(ROOT / "benchmarks" / "results" / "finetuning-cost.json", content)


if __name__ == "__main__":
    main()

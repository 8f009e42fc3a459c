"""A chunk on Hopper: our shortcut policy at K = 1, 2, 4 in every backend, beside the published ReinFlow network.

    python benchmarks/hopper_latency.py --checkout PATH       # of ReinFlow/ReinFlow

The peer is the published flow MLP at its published Hopper sizes, sampled with its own `sample_action` at K = 4.
Samplers take turns of 50 calls over the same recorded observations; each call is a batch of one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.floor import Floor, floor_of, measure_machine
from flowpolicy.acceleration.observations import CALIBRATION_SEED, observations_of
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.statistics import percentiles
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.storage import write_json
from flowpolicy.runs.progress import progress

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "benchmarks/checkpoints/hopper-shortcut-seed0"
CONFIG = "cfg/gym/finetune/hopper-v2/ft_ppo_reflow_mlp.yaml"
BACKENDS = ("eager", "compile", "onnx", "cuda_graph")
STEPS = (1, 2, 4)
TURN = 50


def peer_network(checkout: str) -> Any:
    """The published network with random weights, built from the checkout's own configuration."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    sys.path.insert(0, checkout)
    OmegaConf.register_new_resolver("eval", lambda text: math.prod(int(part) for part in text.split("*")))
    config: Any = OmegaConf.load(Path(checkout) / CONFIG)
    return instantiate(config.model.policy).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", required=True, help="of ReinFlow/ReinFlow")
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--calls", type=int, default=3000, help="timed calls of each sampler")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", default="", help="another JSON file, for a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    policy = FlowPolicy.load(ROOT / arguments.checkpoint)
    task = task_of(policy.spec.task, None, arguments.checkpoint)
    recorded = observations_of(policy, task, 64, episodes=8, seed=CALIBRATION_SEED)["observation"]
    shape = (1, policy.spec.action_horizon, policy.spec.action_dim)
    noise = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    calls: dict[tuple[str, int], Callable[[int], object]] = {}
    floors: dict[tuple[str, int], Floor] = {}
    missing = {}
    limits = measure_machine(policy.device)
    for backend in BACKENDS:
        for steps in STEPS:
            try:
                sampler = build_sampler(policy, batch_size=1, num_steps=steps, backend=backend)
            except FlowPolicyError as error:
                missing[backend] = str(error)
                break
            calls[backend, steps] = lambda i, s=sampler: s({"observation": recorded[i, None]}, noise=noise[i])  # type: ignore[misc]
            floors[backend, steps] = floor_of(sampler, limits)
    network = peer_network(arguments.checkout)
    calls["published MLP", 4] = lambda i: network.sample_action(
        {"state": recorded[i, None]}, 4, True, [-1.0, 1.0], z=noise[i]
    )
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    with torch.no_grad():
        for turn in progress(-(-arguments.calls // TURN) + 1, "timing"):
            for key, call in calls.items():
                for index in range(TURN):
                    started = time.perf_counter()
                    call(index)
                    if turn:  # the first turn warms up
                        seconds[key].append(time.perf_counter() - started)
    rows = [
        {
            "sampler": name,
            "num_steps": steps,
            "milliseconds": percentiles(1e3 * np.array(values)),
            "calls": len(values),
            "floor_ms": floors[name, steps].milliseconds if (name, steps) in floors else None,
        }
        for (name, steps), values in seconds.items()
    ]
    content = {
        "command": "python benchmarks/hopper_latency.py --checkout PATH",
        "checkpoint": arguments.checkpoint,
        "parameters": policy.num_parameters(),
        "peer": f"ReinFlow/ReinFlow, {CONFIG}",
        "peer_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "chunk": list(shape[1:]), "batch": 1, "threads": arguments.threads, "rows": rows,
        "not_measured": missing,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "versions": versions(), "git_commit": git_state()[0],
    }  # fmt: skip
    write_json(arguments.output or ROOT / "benchmarks" / "results" / "latency-hopper.json", content)
    print("| sampler | K | p50 ms | p99 ms | p99.9 ms | max ms | floor ms |\n|" + " --- |" * 7)
    for row in rows:
        times = " | ".join(f"{row['milliseconds'][name]:.3f}" for name in ("p50", "p99", "p99_9", "max"))
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
        print(f"| {row['sampler']} | {row['num_steps']} | {times} | {floor} |")


if __name__ == "__main__":
    main()

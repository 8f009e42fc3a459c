"""Our full computation beside Diffusion Policy's transformer, at equal width, depth, chunk and K, on the same cores.

    python benchmarks/sampler_latency.py --checkout PATH     # of real-stanford/diffusion_policy

Nothing is cached or left out on either side: every block is computed at every step. Samplers take turns, one call
each, so that what else the machine does meets all of them; ratios are formed round by round. Weights are random,
which no latency here depends on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.diffusion_policy_sampler import DDPMSampler, build_model

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.floor import floor_of, measure_machine
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.statistics import percentiles
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.files.storage import write_json
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.runs.progress import progress

ROOT = Path(__file__).resolve().parents[1]
OBSERVATION, OBS_STEPS, ACTION, CHUNK = 20, 2, 2, 16  # Push-T's
BACKENDS = ("eager", "compile", "onnx")
PEER = "peer"


def our_policy(width: int, depth: int, num_heads: int, dropout: float = 0.0) -> FlowPolicy:
    """A flow-matching policy with random weights, all of its blocks at work."""
    torch.manual_seed(0)
    model = TransformerConfig(width=width, depth=depth, num_heads=num_heads, dropout=dropout)
    policy = FlowPolicy(
        PolicyConfig(
            {"name": "flow_matching"}, model, {"observation": (OBSERVATION,)}, ACTION, OBS_STEPS, CHUNK, 8
        )
    ).eval()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if not parameter.any():  # zero at the start of training
                parameter.normal_(0, 0.02)
    policy.fit_normalizers({"observation": torch.randn(100, OBSERVATION)}, torch.randn(100, ACTION))
    return policy


def measure(arguments: argparse.Namespace, num_steps: int, rounds: int) -> dict[str, Any]:
    """Latencies at one K, all samplers taking turns."""
    policy = our_policy(arguments.width, arguments.depth, arguments.heads)
    model = build_model(
        arguments.checkout, width=arguments.width, depth=arguments.depth, num_heads=arguments.heads,
        horizon=CHUNK, action_dim=ACTION, obs_dim=OBSERVATION, obs_steps=OBS_STEPS,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(1, OBS_STEPS, OBSERVATION, generator=generator)
    noise = torch.randn(1, CHUNK, ACTION, generator=generator)
    injected = torch.randn(num_steps, 1, CHUNK, ACTION, generator=generator)
    theirs = DDPMSampler(model, num_steps)
    calls: dict[str, Callable[[], object]] = {PEER: lambda: theirs(observation, noise, injected)}
    missing = {}
    for backend in BACKENDS:
        try:
            sampler = build_sampler(policy, batch_size=1, num_steps=num_steps, backend=backend)
        except FlowPolicyError as error:
            missing[backend] = str(error)
            continue
        calls[backend] = lambda sampler=sampler: sampler({"observation": observation}, noise=noise)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in progress(rounds + 2, f"K = {num_steps}"):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - started))
    peer = np.array(times[PEER])
    rows = {}
    for name, values in times.items():
        ratio = peer / np.array(values)
        rows[name] = {
            "milliseconds": percentiles(np.array(values)),
            "peer_over_this": float(np.median(ratio)),
            "quartiles": [float(np.percentile(ratio, 25)), float(np.percentile(ratio, 75))],
        }
    best = min((name for name in rows if name != PEER), key=lambda name: rows[name]["milliseconds"]["p50"])
    sampler = build_sampler(policy, num_steps=num_steps)
    return {
        "num_steps": num_steps,
        "rounds": rounds,
        "rows": rows,
        "best_backend": best,
        "ratio": rows[best]["peer_over_this"],
        "not_measured": missing,
        "floor_ms": floor_of(sampler, measure_machine(policy.device)).milliseconds,
        "parameters": policy.num_parameters(),
        "peer_parameters": sum(p.numel() for p in model.parameters()),
    }


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| K | sampler | p50 ms | p99 ms | Diffusion Policy / this, median [quartiles] | floor ms |",
        "|" + " --- |" * 6,
    ]
    for found in content["measured"]:
        for name, row in found["rows"].items():
            label = "Diffusion Policy, eager" if name == PEER else f"flowpolicy, {name}"
            low, high = row["quartiles"]
            ratio = "1" if name == PEER else f"{row['peer_over_this']:.2f} [{low:.2f}, {high:.2f}]"
            times = row["milliseconds"]
            floor = "" if name == PEER else f"{found['floor_ms']:.1f}"
            lines.append(
                f"| {found['num_steps']} | {label} | {times['p50']:.1f} | {times['p99']:.1f} | {ratio} | {floor} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", required=True, help="of real-stanford/diffusion_policy")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=30, help="of K = 100; K = 10 takes five times as many")
    parser.add_argument("--output", default="", help="another JSON file, for a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    content = {
        "command": "python benchmarks/sampler_latency.py --checkout PATH "
        f"--width {arguments.width} --depth {arguments.depth} --threads {arguments.threads} --rounds {arguments.rounds}",
        "peer": "real-stanford/diffusion_policy TransformerForDiffusion, eager, DDPM",
        "chunk": CHUNK, "batch": 1, "width": arguments.width, "depth": arguments.depth,
        "num_heads": arguments.heads, "threads": arguments.threads,
        "measured": [
            measure(arguments, 100, arguments.rounds), measure(arguments, 10, 5 * arguments.rounds)
        ],
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "versions": versions(), "git_commit": git_state()[0],
    }  # fmt: skip
    write_json(arguments.output or ROOT / "benchmarks" / "results" / "sampler-latency.json", content)
    print(table(content))


if __name__ == "__main__":
    main()

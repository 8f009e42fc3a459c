"""What few steps cost: flow matching against the shortcut model on held-out Push-T chunks.

    python benchmarks/few_steps.py --checkpoint flow_matching=PATH --checkpoint shortcut=PATH

For K = 1, 2, 4, 8, 16: the root mean square difference of a chunk to the same policy's own chunk at K = 128 from
the same noise, and the energy distance between sampled and demonstrated chunks, both in normalised actions, on
steps of the episodes that were held out of training. Writes benchmarks/results/few-steps.json and a plot.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy import FlowPolicy
from flowpolicy.data.store import read_demonstrations
from flowpolicy.evaluation.statistics import mean_interval
from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.storage import write_json
from flowpolicy.flow.network import field
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.pretraining.config import DataConfig
from flowpolicy.pretraining.run import make_samplers

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 2, 4, 8, 16)
REFERENCE = 128


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| over distinct pairs, for ``(n, d)`` and ``(m, d)`` (Szekely and Rizzo 2013)."""
    n, m = len(x), len(y)
    within_x = torch.cdist(x, x).sum() / (n * (n - 1))
    within_y = torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within_x - within_y)


@torch.no_grad()
def measure(policy: FlowPolicy, store: str, seed: int, windows: int) -> list[dict[str, Any]]:
    """A row for each K."""
    demos = read_demonstrations(store)
    _, held_out = make_samplers(policy, demos, DataConfig(), seed)
    assert held_out is not None
    batch = held_out.batch(torch.linspace(0, len(held_out) - 1, windows).long())
    complete = batch.mask.all(dim=1)
    observation = {key: value[complete] for key, value in batch.observation.items()}
    demonstrated = batch.action[complete].flatten(1)
    noise = torch.randn(demonstrated.shape, generator=torch.Generator().manual_seed(7)).view(
        -1, policy.spec.action_horizon, policy.spec.action_dim
    )
    state = torch.cat([value.flatten(1) for value in observation.values()], dim=1)
    context = policy.network.encode(observation)

    velocity = field(policy.network, context, policy.objective.step_size)

    def sample(num_steps: int) -> Tensor:
        chunk = policy.objective.sample(velocity, noise, SamplerSpec(num_steps=num_steps, solver="euler"))
        return chunk.clamp(-1, 1).flatten(1)

    reference = sample(REFERENCE)
    rows = []
    for num_steps in (*STEPS, REFERENCE):
        chunk = sample(num_steps)
        squared = ((chunk - reference) ** 2).mean(dim=1).double().numpy()
        low, high = mean_interval(squared)
        rows.append(
            {
                "num_steps": num_steps,
                "action_error_rms": float(np.sqrt(squared.mean())),
                "action_error_ci95": [float(np.sqrt(max(low, 0.0))), float(np.sqrt(high))],
                "energy_distance": energy_distance(chunk, demonstrated),
                "energy_distance_with_state": energy_distance(
                    torch.cat([chunk, state], 1), torch.cat([demonstrated, state], 1)
                ),
                "windows": len(chunk),
            }
        )
    return rows


def plot(content: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colors = {"flow_matching": "#0072B2", "shortcut": "#D55E00"}
    for name, rows in content["rows"].items():
        few = [row for row in rows if row["num_steps"] != REFERENCE]
        steps = [row["num_steps"] for row in few]
        low, high = np.array([row["action_error_ci95"] for row in few]).T
        color = colors.get(name)
        axes[0].plot(
            steps, [row["action_error_rms"] for row in few], "o-", color=color, label=name.replace("_", " ")
        )
        axes[0].fill_between(steps, low, high, color=color, alpha=0.2)
        axes[1].plot(
            steps, [row["energy_distance"] for row in few], "o-", color=color, label=name.replace("_", " ")
        )
    axes[0].set(ylabel=f"RMS to own K = {REFERENCE}, normalised", title="Error of few steps")
    axes[1].set(ylabel="energy distance", title="Distance to demonstrated chunks (unbiased)")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(STEPS, [str(step) for step in STEPS])
        axis.set_xlabel("integration steps K")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(0, color="#999999", lw=0.8)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", action="append", required=True, help="NAME=PATH, once per policy")
    parser.add_argument("--store", default="demonstrations/pusht.zarr.zip")
    parser.add_argument(
        "--seed", type=int, default=0, help="the training seed: it fixes the held-out episodes"
    )
    parser.add_argument("--windows", type=int, default=600)
    arguments = parser.parse_args()
    rows = {}
    for entry in arguments.checkpoint:
        name, _, path = entry.partition("=")
        rows[name] = measure(FlowPolicy.load(path), arguments.store, arguments.seed, arguments.windows)
        for row in rows[name]:
            print(
                f"{name:14s} K={row['num_steps']:<4d} error {row['action_error_rms']:.4f} "
                f"energy distance {row['energy_distance']:.4f} (with state {row['energy_distance_with_state']:.4f})"
            )
    content = {
        "command": "python benchmarks/few_steps.py "
        + " ".join(f"--checkpoint {entry}" for entry in arguments.checkpoint),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }
    write_json(ROOT / "benchmarks" / "results" / "few-steps.json", content)
    plot(content, ROOT / "docs" / "images" / "few_steps.png")


if __name__ == "__main__":
    main()

"""lerobot's own SO-101 driver under `scripts/run_control.py`: ten minutes at 30 Hz on a bus that fails now and then.

    pip install 'lerobot[feetech]==0.4.4'        # on the machine, beside flowpolicy[train]
    python benchmarks/lerobot_robot.py           # writes benchmarks/results/lerobot-robot.json
    python benchmarks/lerobot_robot.py --seconds 20 --out DIR

The arm and its two cameras are doubles (so101_double.py): servos that speak Feetech's protocol on a pseudo-terminal,
so that everything from the script to the bytes on the bus is what drives a real arm. The policy is trained here for a
minute, on made-up recordings of a slow wave, in the keys of an imported LeRobot dataset. First `dry_run=true`, which
must put no goal on the bus, then the run. Asserted: no two goals that arrived one after the other are farther apart than
the velocity limit allows in the ticks between them, the first no farther from where the arm was, every one within the
bounds; every failure of the bus that reached the loop is counted under a name; the loop ended by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from so101_double import DEGREES, JOINTS, REACH, Arm, calibration, in_units, picture

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.features import Image, Vector
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.models.config import TransformerConfig
from flowpolicy.pretraining.config import TrainConfig
from flowpolicy.pretraining.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "lerobot-robot.json"
RATE, VELOCITY = 30, 60.0
SIZE = (48, 64)
CAMERAS = {"front": 40, "top": 200}


def wave(seconds: np.ndarray) -> np.ndarray:
    """Joints ``(n, 6)`` in the robot's units: degrees, and percent of the gripper."""
    turn = 2 * np.pi * 0.15 * seconds[:, None]
    found = 30 * np.sin(turn + np.arange(6))
    found[:, 5] += 50
    return found.astype(np.float32)


def train(folder: Path, steps: int) -> None:
    """A policy from recordings of the wave, seen by two cameras."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays: dict[str, list[Any]] = {
        "observation": [],
        "action": [],
        **{f"images.{name}": [] for name in CAMERAS},
    }
    length = 90
    for _ in range(12):
        seconds = rng.uniform(0, 20) + np.arange(length + 1) / RATE
        joints = wave(seconds)
        arrays["observation"] += list(joints[:-1] + rng.normal(0, 0.5, (length, 6)).astype(np.float32))
        arrays["action"] += list(joints[1:])
        for name, tint in CAMERAS.items():
            arrays[f"images.{name}"] += [picture(each, *SIZE, tint) for each in seconds[:-1]]
    data = {key: torch.from_numpy(np.stack(rows)) for key, rows in arrays.items()}
    features = {
        "observation": Vector((6,)), **{f"images.{name}": Image((*SIZE, 3)) for name in CAMERAS},
    }  # fmt: skip
    model = TransformerConfig(width=64, depth=2, num_heads=4)
    task = {"name": "so101-wave", "control_hz": float(RATE)}
    config = PolicyConfig({"name": "flow_matching"}, model, features, 6, 1, 16, 8, task=task)
    policy = FlowPolicy(config)
    actions = data.pop("action")
    policy.fit_normalizers({"observation": data["observation"]}, actions)
    chunks = ChunkSampler(
        policy.normalize(data), policy.action_normalizer.normalize(actions), np.arange(length, 12 * length + 1, length),
        obs_horizon=1, action_horizon=16,
    )  # fmt: skip
    Trainer(policy, chunks, None, TrainConfig(steps=steps, batch_size=32, warmup_steps=10)).run().save(folder)


def control(folder: Path, name: str, port: str, seconds: float, *more: str) -> dict[str, Any]:
    """The script; its summary."""
    cameras = ", ".join(
        f"{key}: {{type: double, width: 160, height: 120, fps: 30, tint: {tint}}}"
        for key, tint in CAMERAS.items()
    )
    command = [
        sys.executable, str(ROOT / "scripts" / "run_control.py"), "plugins=so101_double",
        f"checkpoint={folder / 'policy'}", "robot=lerobot", "robot.type=so101_follower", f"robot.port={port}",
        "robot.id=double", f"robot.calibration_dir={folder}", f"robot.cameras={{{cameras}}}", "num_steps=3",
        "backend=eager", "spares=1", f"control.safety.velocity_limit={VELOCITY:g}", f"duration_s={seconds:g}",
        f"run_dir={folder / name}", *more,
    ]  # fmt: skip
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    )
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, check=False)
    print(done.stderr[-3000:], done.stdout, sep="\n")
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}")
    found: dict[str, Any] = read_json(folder / name / "summary.json", "a summary")
    return found


def judged(commands: np.ndarray, start: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """What arrived on the bus, against the limits.

    A servo's step is the resolution of what can be seen; lerobot rounds down to it.
    """
    goals = in_units(commands[:, 1:])
    step = np.array([DEGREES] * 5 + [100 / (2 * REACH)])
    path = np.concatenate([start[None], goals])
    change = np.abs(np.diff(path, axis=0)) - step
    return {
        "commands": len(goals),
        "largest_change_in_velocity_limits_per_tick": float((change / (VELOCITY / RATE)).max()),
        "beyond_bounds": float(np.maximum(low - goals - step, goals - high - step).max()),
    }


def read_started(folder: Path) -> np.ndarray:
    """When the ticks of a run began."""
    import pyarrow.parquet as pq

    return np.asarray(pq.read_table(folder / "telemetry.parquet")["started"])


def main() -> None:
    """Train, rehearse, run, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--policy", type=Path, help="one of an earlier run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="so101-"))
    (folder / "double.json").write_text(json.dumps(calibration()))
    if options.policy:
        (folder / "policy").symlink_to(options.policy.resolve())
    else:
        train(folder / "policy", options.steps)
    policy = FlowPolicy.load(folder / "policy")
    reach = policy.action_normalizer.clip * policy.action_normalizer.scale
    low, high = (
        (policy.action_normalizer.center - reach).numpy(),
        (policy.action_normalizer.center + reach).numpy(),
    )
    start = in_units(2048.0 + 60 * (np.arange(1, 7) % 3 - 1))

    arm = Arm(folder)
    rehearsal = control(folder, "rehearsal", arm.port, min(options.seconds, 10.0), "dry_run=true")
    sent, _ = arm.close()
    assert len(sent) == 0, f"a rehearsal sent {len(sent)} commands"

    arm = Arm(folder)
    run = control(folder, "run", arm.port, options.seconds)
    commands, bus = arm.close()
    found = judged(commands, start, low, high)
    events = run["metrics"]["events"]
    started = read_started(folder / "run")
    injected = {
        name: sum(started[0] < each < started[-1] - 0.5 for each in moments)
        for name, moments in bus["injected"].items()
    }  # while the loop ran; what fails in its last moments may not reach it
    failed, told = (
        injected["missing"] + injected["garbled"] + injected["silent"],
        events.get("robot error", 0),
    )
    content = {
        "command": " ".join(["python", *sys.argv]), "date": datetime.now(UTC).date().isoformat(), "git": git_state(),
        "machine": machine(), "versions": versions(), "lerobot": _lerobot(), "seconds": options.seconds, "rate_hz": RATE,
        "velocity_limit": VELOCITY, "joints": list(JOINTS), "polls_that_failed": injected, "arrived": found, "events": events,
        "stopped": run["metrics"]["stopped"], "ticks": run["metrics"]["ticks"],
        "missed": run["metrics"]["missed"], "sources": run["metrics"]["sources"],
        "observation_age_ms": run["metrics"]["observation_age_ms"], "jitter_ms": run["metrics"]["jitter_ms"],
        "inference_ms": run["metrics"]["inference_ms"], "checks": run["about"]["checks"],
        "rehearsal": {"commands_on_the_bus": len(sent), "would_have_sent": rehearsal["metrics"]["would_have_sent"]},
    }  # fmt: skip
    write_json(options.out if options.out.suffix == ".json" else options.out / "lerobot-robot.json", content)
    print(
        json.dumps(
            {key: content[key] for key in ("polls_that_failed", "arrived", "events", "sources", "stopped")},
            indent=1,
        )
    )
    assert run["metrics"]["stopped"] == "finished"
    assert found["largest_change_in_velocity_limits_per_tick"] <= 1.001
    assert found["beyond_bounds"] <= 0
    assert told >= failed, f"{failed} polls failed, and {told} errors were counted"


def _lerobot() -> str:
    import lerobot

    return str(lerobot.__version__)


if __name__ == "__main__":
    main()

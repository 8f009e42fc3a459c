"""lerobot's own SO-101 driver under `scripts/run_control.py`: ten minutes at 30 Hz on a bus that fails now and then.

    pip install 'lerobot[feetech]==0.4.4'        # on the machine, beside flowpolicy[train]
    python benchmarks/lerobot_robot.py           # writes benchmarks/results/lerobot-robot.json
    python benchmarks/lerobot_robot.py --seconds 20 --out short.json

The arm and its two cameras are doubles (so101_double.py): servos that speak Feetech's protocol on a pseudo-terminal,
so that everything from the script to the bytes on the bus is what drives a real arm. The policy is trained here for a
minute, on made-up recordings of a slow wave, in the keys of an imported LeRobot dataset. First `dry_run=true`, which
must put no goal on the bus, then the run. Asserted of what arrived on the bus: no goal is farther from the one before it
than the velocity limit allows in one tick, the first no farther from where the arm stood, and every one is within the
bounds. Of the loop: after every poll that the bus let fail a tick tells of a robot error, and it ended by itself.
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
from so101_double import AT_REST, DEGREES, JOINTS, REACH, Arm, calibration, in_units, picture

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.control.events import Event
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
TOLD_WITHIN_S = 0.25
"""From a poll's failure to the tick that tells of it: lerobot waits some 60 ms for an answer."""
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


def control(folder: Path, name: str, port: str, seconds: float, *more: str) -> None:
    """The script."""
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


def drive(folder: Path, options: argparse.Namespace) -> None:
    """A policy, a rehearsal and the run; what arrived on the bus is kept in a folder of each."""
    (folder / "double.json").write_text(json.dumps(calibration()))
    if options.policy:
        (folder / "policy").symlink_to(options.policy.resolve())
    else:
        train(folder / "policy", options.steps)
    for name, seconds, more in (
        ("rehearsal", min(options.seconds, 10.0), ["dry_run=true"]), ("run", options.seconds, []),
    ):  # fmt: skip
        (folder / f"bus-{name}").mkdir()
        arm = Arm(folder / f"bus-{name}")
        try:
            control(folder, name, arm.port, seconds, *more)
        finally:
            arm.close()


def on_the_bus(folder: Path) -> dict[str, Any]:
    """The goals that arrived in the run, against the limits, and how many did in the rehearsal.

    A servo's step is the resolution of what can be seen; lerobot rounds down to it.
    """
    normalizer = FlowPolicy.load(folder / "policy").action_normalizer
    middle, reach = normalizer.center.numpy(), normalizer.clip * normalizer.scale.numpy()
    goals = in_units(np.load(folder / "bus-run" / "commands.npy")[:, 1:])
    step = np.array([DEGREES] * 5 + [100 / (2 * REACH)])
    path = np.concatenate([in_units(AT_REST)[None], goals])
    change = np.abs(np.diff(path, axis=0)) - step
    return {
        "goals": len(goals),
        "largest_change_in_velocity_limits_per_tick": float((change / (VELOCITY / RATE)).max()),
        "beyond_bounds": float((np.abs(goals - middle) - reach - step).max()),
        "goals_in_the_rehearsal": len(np.load(folder / "bus-rehearsal" / "commands.npy")),
    }


def failures(folder: Path) -> dict[str, Any]:
    """Polls that the bus let fail while the loop ran, and how many of them no tick after them told of."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "run" / "telemetry.parquet", columns=["started", "events"])
    started, bits = (np.asarray(rows[name]) for name in ("started", "events"))
    told = started[(bits >> Event.ROBOT_ERROR) & 1 == 1]
    bus = json.loads((folder / "bus-run" / "commands.json").read_text())
    found: dict[str, Any] = {"polls": bus["polls"]}
    unnamed = 0
    for name, moments in bus["injected"].items():
        during = [each for each in moments if started[0] < each < started[-1] - TOLD_WITHIN_S]
        found[name] = len(during)
        if name != "late":  # is no failure: it came
            after = np.searchsorted(told, during)
            waits = np.append(told, np.inf)[after] - np.array(during)
            unnamed += int((waits > TOLD_WITHIN_S).sum())
    return {**found, "unnamed": unnamed}


def main() -> None:
    """Train, rehearse, run, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--policy", type=Path, help="one of an earlier run")
    parser.add_argument("--folder", type=Path, help="of an earlier run, which is judged again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="so101-"))
    if options.folder is None:
        drive(folder, options)
    run, rehearsal = (read_json(folder / name / "summary.json", "a summary") for name in ("run", "rehearsal"))
    metrics = run["metrics"]
    content = {
        "command": "python benchmarks/lerobot_robot.py", "date": datetime.now(UTC).date().isoformat(),
        "git": git_state(), "machine": machine(), "versions": versions(), "lerobot": _lerobot(),
        "seconds": metrics["seconds"], "rate_hz": RATE, "velocity_limit": VELOCITY, "joints": list(JOINTS),
        "bus_failures": failures(folder), "on_the_bus": on_the_bus(folder), "checks": run["about"]["checks"],
        "would_have_sent": rehearsal["metrics"]["would_have_sent"],
        **{key: metrics[key] for key in ("stopped", "ticks", "missed", "events", "sources", "delays")},
        **{key: metrics[key] for key in ("observation_age_ms", "jitter_ms", "inference_ms")},
    }  # fmt: skip
    write_json(options.out, content)
    shown = ("bus_failures", "on_the_bus", "events", "sources", "stopped")
    print(json.dumps({key: content[key] for key in shown}, indent=1))
    bus = content["on_the_bus"]
    assert metrics["stopped"] == "finished"
    assert bus["goals_in_the_rehearsal"] == 0
    assert bus["largest_change_in_velocity_limits_per_tick"] <= 1.0
    assert bus["beyond_bounds"] <= 0
    assert content["bus_failures"]["unnamed"] == 0


def _lerobot() -> str:
    import lerobot

    return str(lerobot.__version__)


if __name__ == "__main__":
    main()

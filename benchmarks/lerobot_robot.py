"""lerobot's own SO-101 driver under `scripts/run_control.py`: ten minutes at 30 Hz on a bus that fails now and then.

    pip install 'lerobot[feetech]==0.4.4'        # on the machine, beside flowpolicy[train]
    python benchmarks/lerobot_robot.py           # writes benchmarks/results/lerobot-robot.json
    python benchmarks/lerobot_robot.py --seconds 20 --out short.json
    git clone --depth 1 --branch v0.4.4 https://github.com/huggingface/lerobot /tmp/lerobot
    python benchmarks/lerobot_robot.py --checkout /tmp/lerobot      # also drives the robot of lerobot's own tests

The arm and its two cameras are doubles (so101_double.py): servos that speak Feetech's protocol on a pseudo-terminal,
so that everything from the script to the bytes on the bus is what drives a real arm. The policy is trained here for a
minute, on made-up recordings of a slow wave, in the keys of an imported LeRobot dataset. First `dry_run=true`, which
must put no goal on the bus, then the run, which is recorded, with an operator who follows a script
(scripted_operator.py). Asserted of what arrived on the bus: no goal is farther from the one before it than the velocity
limit allows in one tick, the first no farther from where the arm stood, and every one is within the bounds; the
operator's first command arrives in the tick of the take-over, unless the bus failed then. Of the loop: after every poll
that the bus let fail a tick tells of a robot error, whatever the operator did is an event of its tick, and it ended by
itself. Of the recording: it is what the telemetry says was sent, tick by tick, with the pictures of that moment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operated_run import Ticks, arrivals, log_of, named, recording
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
WAITS_S = 0.07
"""A poll that reaches the servos later, on a busy machine, has been given up and told of before it fails."""
SIZE = (48, 64)
CAMERAS = {"front": 40, "top": 200}
STEP = np.array([DEGREES] * 5 + [100 / (2 * REACH)])
"""Of a servo: the resolution of what can be seen; lerobot rounds down to it."""
MOCK_S = 30.0
CONNECTIONS = 6
"""Most tries: lerobot pings each servo once, and a busy machine is late for some answer."""
ON_TIME = 0.95
"""Share of the recorded pictures: the cameras freeze for 0.8 s in 70, half a second of which lerobot lets pass."""


def wave(seconds: np.ndarray) -> np.ndarray:
    """Joints ``(n, 6)`` in the robot's units: degrees, and percent of the gripper."""
    turn = 2 * np.pi * 0.15 * seconds[:, None]
    found = 30 * np.sin(turn + np.arange(6))
    found[:, 5] += 50
    return found.astype(np.float32)


def train(folder: Path, steps: int, cameras: Mapping[str, int]) -> None:
    """A policy from recordings of the wave, seen by cameras."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays: dict[str, list[Any]] = {
        "observation": [],
        "action": [],
        **{f"images.{name}": [] for name in cameras},
    }
    length = 90
    for _ in range(12):
        seconds = rng.uniform(0, 20) + np.arange(length + 1) / RATE
        joints = wave(seconds)
        arrays["observation"] += list(joints[:-1] + rng.normal(0, 0.5, (length, 6)).astype(np.float32))
        arrays["action"] += list(joints[1:])
        for name, tint in cameras.items():
            arrays[f"images.{name}"] += [picture(each, *SIZE, tint) for each in seconds[:-1]]
    data = {key: torch.from_numpy(np.stack(rows)) for key, rows in arrays.items()}
    features = {
        "observation": Vector((6,)), **{f"images.{name}": Image((*SIZE, 3)) for name in cameras},
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


def control(folder: Path, name: str, seconds: float, *more: str, paths: Sequence[Path] = ()) -> None:
    """The script."""
    command = [
        sys.executable, str(ROOT / "scripts" / "run_control.py"), "robot=lerobot", "num_steps=3", "backend=eager",
        "spares=1", f"control.safety.velocity_limit={VELOCITY:g}", f"duration_s={seconds:g}",
        f"run_dir={folder / name}", *more,
    ]  # fmt: skip
    found = [*map(str, paths), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(found))
    for _ in range(CONNECTIONS):
        done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, check=False)
        print(done.stderr[-3000:], done.stdout, sep="\n", flush=True)
        if "cannot be connected" not in done.stderr:
            break
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}")


def operated(folder: Path, name: str) -> list[str]:
    """Settings of a run that is recorded, with an operator."""
    kept = folder / f"operator-{name}.json"
    operator = f"{{kind: 'scripted_operator:ScriptedOperator', kept: '{kept}'}}"
    return [f"operator={operator}", f"record={folder / f'recorded-{name}'}"]


def drive(folder: Path, options: argparse.Namespace) -> None:
    """A policy, a rehearsal and the run; what arrived on the bus is kept in a folder of each."""
    (folder / "double.json").write_text(json.dumps(calibration()))
    if options.policy:
        (folder / "policy").symlink_to(options.policy.resolve())
    else:
        train(folder / "policy", options.steps, CAMERAS)
    cameras = ", ".join(
        f"{key}: {{type: double, width: 160, height: 120, fps: 30, tint: {tint}}}"
        for key, tint in CAMERAS.items()
    )
    for name, seconds, more in (
        ("rehearsal", min(options.seconds, 10.0), ["dry_run=true"]),
        ("run", options.seconds, operated(folder, "run")),
    ):
        (folder / f"bus-{name}").mkdir()
        arm = Arm(folder / f"bus-{name}")
        try:
            control(
                folder, name, seconds, "plugins=so101_double", f"checkpoint={folder / 'policy'}",
                "robot.type=so101_follower", f"robot.port={arm.port}", "robot.id=double",
                f"robot.calibration_dir={folder}", f"robot.cameras={{{cameras}}}", *more,
            )  # fmt: skip
        finally:
            arm.close()


def drive_mock(folder: Path, checkout: Path, steps: int) -> None:
    """The robot of lerobot's tests: it takes every command and stays where it is."""
    train(folder / "policy-mock", steps, {})
    values = ", ".join(f"{value:.3f}" for value in wave(np.zeros(1))[0])
    control(
        folder, "mock", MOCK_S, "plugins=tests.mocks.mock_robot", f"checkpoint={folder / 'policy-mock'}",
        "robot.type=mock_robot",
        f"robot.options={{n_motors: 6, random_values: false, static_values: [{values}]}}",
        *operated(folder, "mock"), paths=[checkout],
    )  # fmt: skip


def judged_mock(folder: Path) -> dict[str, Any]:
    """What it was sent, as the telemetry says; and the recording against that."""
    sent = Ticks.of(folder / "mock").sent
    change = np.abs(np.diff(sent[np.isfinite(sent[:, 0])], axis=0))
    metrics = read_json(folder / "mock" / "summary.json", "a summary")["metrics"]
    return {
        "largest_change_in_velocity_limits_per_tick": float(change.max() / (VELOCITY / RATE)),
        "operator": named(folder / "mock", log_of(folder, "mock")),
        "recording": recording(folder / "mock", folder / "recorded-mock"),
        **{key: metrics[key] for key in ("stopped", "ticks", "missed", "events", "sources")},
    }


def goals_of(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Goals ``(n, 6)`` that arrived in a run, in the robot's units, and when."""
    kept = np.load(folder / f"bus-{name}" / "commands.npy")
    return in_units(kept[:, 1:]), kept[:, 0]


def on_the_bus(folder: Path) -> dict[str, Any]:
    """The goals that arrived in the run, against the limits, and how many did in the rehearsal."""
    normalizer = FlowPolicy.load(folder / "policy").action_normalizer
    middle, reach = normalizer.center.numpy(), normalizer.clip * normalizer.scale.numpy()
    goals, _ = goals_of(folder, "run")
    change = np.abs(np.diff(np.concatenate([in_units(AT_REST)[None], goals]), axis=0)) - STEP
    return {
        "goals": len(goals),
        "largest_change_in_velocity_limits_per_tick": float((change / (VELOCITY / RATE)).max()),
        "beyond_bounds": float((np.abs(goals - middle) - reach - STEP).max()),
        "goals_in_the_rehearsal": len(goals_of(folder, "rehearsal")[0]),
    }


def failures(folder: Path) -> dict[str, Any]:
    """Polls that the bus let fail while the loop ran, and how many of them no tick after them told of."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "run" / "telemetry.parquet", columns=["started", "events"])
    started, bits = (np.asarray(rows[name]) for name in ("started", "events"))
    told = started[(bits >> Event.ROBOT_ERROR) & 1 == 1]
    bus = json.loads((folder / "bus-run" / "commands.json").read_text())
    found: dict[str, Any] = {"polls": bus["polls"]}
    unnamed = given_up = 0
    for name, moments in bus["injected"].items():
        during = np.array([each for each in moments if started[0] < each < started[-1] - TOLD_WITHIN_S])
        found[name] = len(during)
        if name != "late":  # is no failure: it came
            after = np.searchsorted(told, during)
            silent = np.append(told, np.inf)[after] - during > TOLD_WITHIN_S
            before = during - np.append(told, -np.inf)[after - 1] <= WAITS_S
            given_up += int((silent & before).sum())
            unnamed += int((silent & ~before).sum())
    return {**found, "given_up_before": given_up, "unnamed": unnamed}


def main() -> None:
    """Train, rehearse, run, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--policy", type=Path, help="one of an earlier run")
    parser.add_argument("--folder", type=Path, help="of an earlier run, which is judged again")
    parser.add_argument("--checkout", type=Path, help="of lerobot, whose tests have a robot")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="so101-"))
    if options.folder is None:
        drive(folder, options)
        if options.checkout is not None:
            drive_mock(folder, options.checkout, options.steps)
    run, rehearsal = (read_json(folder / name / "summary.json", "a summary") for name in ("run", "rehearsal"))
    metrics, done = run["metrics"], log_of(folder, "run")
    limits = {"step": STEP, "velocity": VELOCITY / RATE, "period": 1 / RATE}
    content = {
        "command": "python benchmarks/lerobot_robot.py", "date": datetime.now(UTC).date().isoformat(),
        "git": git_state(), "machine": machine(), "versions": versions(), "lerobot": _lerobot(),
        "seconds": metrics["seconds"], "rate_hz": RATE, "velocity_limit": VELOCITY, "joints": list(JOINTS),
        "bus_failures": failures(folder), "on_the_bus": on_the_bus(folder),
        "operator": named(folder / "run", done),
        "take_overs": arrivals(folder / "run", *goals_of(folder, "run"), done, limits),
        "recording": recording(folder / "run", folder / "recorded-run"), "checks": run["about"]["checks"],
        "would_have_sent": rehearsal["metrics"]["would_have_sent"],
        **{key: metrics[key] for key in ("stopped", "ticks", "missed", "events", "sources", "delays")},
        **{key: metrics[key] for key in ("observation_age_ms", "jitter_ms", "inference_ms")},
        "mock_robot": judged_mock(folder) if (folder / "mock").exists() else None,
    }  # fmt: skip
    write_json(options.out, content)
    shown = (
        "bus_failures", "on_the_bus", "operator", "take_overs", "recording", "events", "sources", "stopped",
        "mock_robot",
    )  # fmt: skip
    print(json.dumps({key: content[key] for key in shown}, indent=1))
    check(content)


def check(found: dict[str, Any]) -> None:
    """The bars."""
    bus, operator = found["on_the_bus"], found["take_overs"]
    assert found["stopped"] == "finished"
    assert bus["goals_in_the_rehearsal"] == 0
    assert bus["largest_change_in_velocity_limits_per_tick"] <= 1.0
    assert max(operator["largest_change_in_velocity_limits_per_tick"].values()) <= 1.0
    assert bus["beyond_bounds"] <= 0
    assert found["bus_failures"]["unnamed"] == 0
    assert operator["unexplained"] == 0
    assert operator["of_a_period"] <= 1.0
    for key, tint in CAMERAS.items():
        frames = found["recording"]["frames"][f"images.{key}"]
        assert abs(frames["tint"] - tint) <= 1
        assert frames["pictures"] == found["recording"]["steps"]
        assert frames["on_time"] >= ON_TIME
    for each in (found, found["mock_robot"]):
        if each is not None:
            recorded = each["recording"]
            assert all(value for key, value in recorded.items() if key.endswith("_equal")), recorded
            assert recorded["ticks_that_did_not_happen"] == each["missed"]


def _lerobot() -> str:
    import lerobot

    return str(lerobot.__version__)


if __name__ == "__main__":
    main()

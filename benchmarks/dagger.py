"""DAgger in simulation: a scripted operator corrects a mediocre policy, which then goes on training with the corrections.

    python benchmarks/dagger.py                  # carries out what is missing, writes the JSON
    python benchmarks/dagger.py --seeds 0        # of one seed
    python benchmarks/dagger.py --report         # only collects what is there

Of each seed: eight scripted demonstrations of Meta-World's peg insertion; a base policy trained on them; the base
policy in the real control loop, on a clock that does not wait, with an operator who takes over where an episode goes
wrong, until 30 episodes were corrected and recorded; and training that goes on from the base policy with the
demonstrations and the operator's steps, and for as many steps with the demonstrations alone. All three policies are
evaluated on the same episodes. Results go to benchmarks/results/dagger.json, which says what is missing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flowpolicy import FlowPolicy
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import EventLog
from flowpolicy.control.inference import Answer, Request
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.operator import Intervention, Moment
from flowpolicy.control.policy_inference import PolicyInference
from flowpolicy.control.recorder import Recorder
from flowpolicy.control.robot import EPISODE, SUCCESS, TIMESTAMP, RobotSpec
from flowpolicy.data.command_source import commanded_shares
from flowpolicy.data.store import read_demonstrations
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.statistics import (
    mean_interval_by_seed,
    paired_difference_interval,
    success_interval_by_seed,
)
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks"
]  # its metaworld.py
RUNS = ROOT / "runs" / "benchmarks" / "dagger"
RESULT = ROOT / "benchmarks" / "results" / "dagger.json"
TASK = ("env=metaworld", "env.env_kwargs.task=peg-insert-side-v3")
TRAINING = (
    "policy=flow_matching", "data=gaussian", "train.batch_size=64", "train.final_episodes=0", "train.threads=1",
    "train.save_every=250", "video=false",
)  # fmt: skip
DEMONSTRATIONS, CORRECTED, EPISODES = 8, 30, 100
BASE_STEPS, MORE_STEPS = 1000, 1000
SEEDS = (0, 1, 2)
FIRST_EPISODE = 7_000_000
"""Environment seed of the first corrected episode; evaluation's are lower."""
PARTS = ("base", "without", "with")
"""The base policy; training gone on with the demonstrations alone; with the corrections too."""


class SteppedWorld:
    """The task as a robot that takes a step at every command; its clock is the loop's."""

    def __init__(self, task: Any, seed: int) -> None:
        self.env, self.period = task.make(), 1 / task.control_hz
        space = self.env.action_space
        shapes = {key: shape for key, (shape, _) in self.env.fields.items()}
        self.spec = RobotSpec(task.name, shapes, space.low, space.high, task.control_hz, task.safe_action)
        self.time, self.seed, self.episode, self.success = 0.0, seed, -1, -1
        self._begin()

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)

    def observe(self) -> dict[str, Any]:
        return {**self.observation, TIMESTAMP: self.time, EPISODE: self.episode, SUCCESS: self.success}

    def act(self, action: np.ndarray) -> None:
        self.observation, _, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.success = int(info["success"])
            self._begin()

    def close(self) -> None:
        self.env.close()

    def _begin(self) -> None:
        self.episode += 1
        self.observation, _ = self.env.reset(seed=self.seed + self.episode)


class InlineWorker:
    """Samples where it is asked, in no time of the loop's clock."""

    def __init__(self, policy: FlowPolicy, seed: int) -> None:
        self._infer, self._request = PolicyInference(policy, seed), None

    def submit(self, request: Request) -> None:
        self._request = request

    def poll(self, timeout: float = 0.0) -> Answer | None:
        request, self._request = self._request, None
        return None if request is None else Answer(request.step, self._infer(request), 0.0)

    def ready(self, timeout: float = 0.0) -> bool:
        return True

    def restart(self) -> None:
        self._request = None

    def close(self) -> None:
        pass


class Corrector:
    """Takes over where nothing has moved for a while, or where the episode takes longer than it should.

    It commands for a while with Meta-World's own scripted policy, from whatever state it finds, and gives back.
    """

    name: ClassVar[str] = "corrector"
    STILL, MOVED_M = 30, 0.015  # ticks in which hand and object together must move by more
    LATE, COMMANDS = 140, 110  # ticks an episode may take; ticks of a correction

    def __init__(self, world: SteppedWorld, wanted: int, stop: Any) -> None:
        self.world, self.wanted, self.stop = world, wanted, stop
        self.episode, self.corrected = -1, set[int]()

    def start(self, spec: RobotSpec, period: float) -> None:
        self._begin()

    def close(self) -> None:
        pass

    def read(self, moment: Moment) -> Intervention:
        from metaworld.policies import ENV_POLICY_MAP

        if self.world.episode != self.episode:
            self._begin()
            if len(self.corrected) == self.wanted:
                self.stop()
        self.age += 1
        seen = moment.observation["observation"].astype(np.float64)
        self.path.append(seen[[0, 1, 2, 4, 5, 6]])
        recent = np.array(self.path[-self.STILL :])
        is_still = len(recent) == self.STILL and np.ptp(recent, axis=0).max() < self.MOVED_M
        if self.left == 0 and (is_still or self.age > self.LATE):
            self.left, self.expert = self.COMMANDS, ENV_POLICY_MAP[self.world.env.unwrapped.task]()
            self.corrected.add(self.episode)
        if self.left == 0:
            return Intervention()
        self.left -= 1
        if self.left == 0:
            self.age, self.path = self.LATE // 2, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that commands are clipped, which is meant
            action = self.expert.get_action(seen.copy())
        return Intervention(np.clip(action, -1, 1).astype(np.float32))

    def _begin(self) -> None:
        self.episode, self.age, self.left = self.world.episode, 0, 0
        self.path: list[np.ndarray] = []


def correct(folder: Path, seed: int) -> None:
    """Record corrected episodes of the base policy into ``corrections.zarr``."""
    policy = FlowPolicy.load(folder / "base" / "checkpoint")
    task = task_of(policy.spec.task, None, folder / "base")
    world = SteppedWorld(task, FIRST_EPISODE + 10_000 * seed)
    events = EventLog()
    operator = Corrector(world, CORRECTED, lambda: loop.stop("enough episodes"))
    about = {"env_id": task.env_id, "fps": task.control_hz}
    recorder = Recorder(folder / "corrections.zarr", policy.spec.features, events, about)
    loop = ControlLoop(
        world, policy, InlineWorker(policy, seed), ControlConfig(priority=False, driver_timeout_s=60.0),
        operator=operator, recorder=recorder, clock=world, events=events,
    )  # fmt: skip
    status = loop.run(500_000)
    recorder.close()
    world.close()
    write_json(folder / "corrections.json", {
        "ticks": status.tick + 1, "stopped": status.stopped, "episodes": world.episode,
        "corrected": len(operator.corrected), "events": events.content()["counts"],
    })  # fmt: skip


def script(name: str, *options: str) -> None:
    """Run a script; one thread, since another program may have the other core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, f"scripts/{name}.py", *options], cwd=ROOT, env=environment, check=True)


def carry_out(seed: int) -> None:
    """What is missing of a seed."""
    folder = RUNS / f"seed{seed}"
    demos, corrections = folder / "demonstrations.zarr", folder / "corrections.zarr"
    if not demos.exists():
        options = (
            f"episodes={DEMONSTRATIONS}",
            f"seed={seed}",
            f"out={demos}",
            f"run_dir={folder / 'collect'}",
        )
        script("collect_demos", *TASK, *options)
    start = f"init={folder / 'base' / 'checkpoint'}"
    data = {
        "base": (f"data.path={demos}", f"train.steps={BASE_STEPS}"),
        "without": (start, f"data.path={demos}", f"train.steps={MORE_STEPS}"),
        "with": (
            start, f"data.path=[{demos},{corrections}]", "data.weights=[1,1]", "data.only_source=operator",
            f"train.steps={MORE_STEPS}",
        ),
    }  # fmt: skip
    for part in PARTS:
        run = folder / part
        if part != "base" and not (folder / "corrections.json").exists():
            for begun in (corrections, folder / f".{corrections.name}.recording"):
                shutil.rmtree(begun, ignore_errors=True)
            correct(folder, seed)
        if not (run / "summary.json").exists():
            script("pretrain", *TASK, *TRAINING, *data[part], f"seed={seed}", f"run_dir={run}", "resume=true")
    for part in PARTS:
        run = folder / part
        if not (run / "episodes.csv").exists():
            policy = FlowPolicy.load(run / "checkpoint")
            task = task_of(policy.spec.task, None, run)
            evaluate(policy, task, episodes=EPISODES, show_progress=False).write_csv(run / "episodes.csv")


def report() -> dict[str, Any]:
    """Success of the three policies, and the difference that the corrections make, as far as they are there."""
    rows, missing = [], []
    for seed in SEEDS:
        folder = RUNS / f"seed{seed}"
        there = [part for part in PARTS if (folder / part / "episodes.csv").exists()]
        missing += [f"seed{seed}/{part}" for part in PARTS if part not in there]
        row: dict[str, Any] = {"seed": seed, "success": {part: _success(folder / part) for part in there}}
        if (folder / "corrections.json").exists():
            recorded = read_demonstrations(folder / "corrections.zarr")
            row["recorded"] = {
                **read_json(folder / "corrections.json"), "steps": recorded.num_steps,
                "shares": commanded_shares(recorded.arrays),
            }  # fmt: skip
        rows.append(row)
    commit, dirty = git_state()
    content: dict[str, Any] = {
        "command": "python benchmarks/dagger.py", "complete": not missing, "missing": missing,
        "task": TASK[1].split("=")[1], "demonstrations": DEMONSTRATIONS, "base_steps": BASE_STEPS,
        "more_steps": MORE_STEPS, "episodes": EPISODES, "training": list(TRAINING),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine(),
        "versions": versions(), "git_commit": commit, "git_dirty": dirty,
    }  # fmt: skip
    whole = [row["success"] for row in rows if len(row["success"]) == len(PARTS)]
    if whole:
        by_part = {part: [found[part] for found in whole] for part in PARTS}
        gains = [found["with"] - found["without"] for found in whole]
        content |= {
            "success": {part: float(np.mean(values)) for part, values in by_part.items()},
            "success_ci95": {part: list(success_interval_by_seed(v)) for part, v in by_part.items()},
            "gain": float(np.mean(gains)), "gain_ci95": list(mean_interval_by_seed(gains)),
        }  # fmt: skip
    for row in rows:
        found = row["success"]
        if len(found) == len(PARTS):
            row["gain"] = float(np.mean(found["with"] - found["without"]))
            row["gain_ci95"] = list(paired_difference_interval(found["with"], found["without"]))
        row["success"] = {part: float(values.mean()) for part, values in found.items()}
    return {**content, "rows": rows}


def _success(folder: Path) -> np.ndarray:
    with (folder / "episodes.csv").open(newline="") as stream:
        return np.array(
            [row["success"] in ("True", "1", "1.0") for row in csv.DictReader(stream)][:EPISODES], float
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="to carry out")
    parser.add_argument("--report", action="store_true", help="only collect what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in () if arguments.report else arguments.seeds:
        carry_out(seed)
    content = report()
    write_json(RESULT, content)
    print("| seed | base | without corrections | with | gain |\n" + "| --- " * 5 + "|")
    for row in content["rows"]:
        cells = [f"{row['success'][part]:.3f}" if part in row["success"] else "" for part in PARTS]
        print(f"| {row['seed']} | {' | '.join(cells)} | {_interval(row)} |")
    print(f"gain: {_interval(content)}; missing: {', '.join(content['missing']) or 'nothing'}")


def _interval(found: dict[str, Any]) -> str:
    if "gain" not in found:
        return ""
    low, high = found["gain_ci95"]
    return f"{found['gain']:+.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()

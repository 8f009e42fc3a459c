"""One checkout's side of benchmarks/compare_versions.py: whatever is imported here is that checkout's.

    python benchmarks/peers/version_worker.py CHECKOUT JOB '{"setting": "value"}'

Jobs that end: `command` runs a flowpolicy command, `chunks` samples checkpoints, `import` imports. The others are done
so many times when told to: a line of JSON says that they are ready, then each line `N` is answered by the seconds that
N of them took, by the clock and of the processor.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

RENAMED = {"flowpolicy_configs": "configs", "flowpolicy_envs": "envs", "flowpolicy_scripts": "scripts"}
QUESTIONS = Path(__file__).resolve().parents[2] / "tests" / "existing_files"
SPEAK = os.dup(1)
Turn = Callable[[], object]


class Checkout:
    """Finds the packages of a checkout before those that are installed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = self.root / RENAMED.get(name, name)
        if name != "flowpolicy" and name not in RENAMED:
            return None
        places = [str(folder)]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=places
        )


# What may differ between versions ------------------------------------------------------------------------------------


def sampler(checkpoint: str, settings: Mapping[str, Any]) -> Any:
    """A sampler that is built once, with ``act(observations, noise=...)``."""
    from flowpolicy import FlowPolicy
    from flowpolicy.acceleration.sampler import build_sampler

    return build_sampler(FlowPolicy.load(checkpoint), **settings)


def training_step() -> tuple[Any, str]:
    """The method that does one optimiser step of pretraining."""
    from flowpolicy.pretraining.trainer import Trainer

    return Trainer, "step"


def update() -> tuple[Any, str]:
    """The method that learns from an iteration's chunks; its object has ``policy``, as stable-baselines3 says."""
    from flowpolicy.finetuning.reinflow import ReinFlow

    return ReinFlow, "train"


def drive(settings: Mapping[str, Any], clock: Any, on_tick: Callable[[], None]) -> None:
    """A control loop without end, with a robot and a worker that cost nothing."""
    import numpy as np
    from control_timing import NoInference  # the checkout's own, in its benchmarks/

    from flowpolicy import FlowPolicy
    from flowpolicy.control.config import ControlConfig
    from flowpolicy.control.loop import ControlLoop
    from flowpolicy.control.robots.trace import TraceRobot

    policy = FlowPolicy.load(settings["checkpoint"])
    rng, rows = np.random.default_rng(0), 1000
    observations = {"observation": rng.standard_normal((rows, 11), np.float32)}
    actions = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
    robot: Any = TraceRobot(observations, np.array([rows]), actions, 100.0, clock=clock)
    robot.act = lambda action: on_tick()
    ControlLoop(robot, policy, NoInference((4, 3)), ControlConfig(priority=False), clock=clock).run(10**9)


# Jobs ----------------------------------------------------------------------------------------------------------------


def command(settings: Mapping[str, Any]) -> None:
    """The command line, in this process."""
    from flowpolicy.__main__ import main

    with mock.patch.object(sys, "argv", ["flowpolicy", *settings["words"]]):
        main()


def chunks(settings: Mapping[str, Any]) -> None:
    """Chunks of checkpoints, by the policy and by an eager sampler, in a file of arrays.

    Each is asked what suits a checkpoint that the older version wrote, whose format is known here.
    """
    import numpy as np
    from questions import ROWS, Question

    from flowpolicy import FlowPolicy

    found = {}
    for name, (folder, asked_of) in settings["checkpoints"].items():
        asked = Question.of_checkpoint(Path(asked_of))
        eager = sampler(folder, {"batch_size": ROWS, "backend": "eager"})
        for way, sampled in (("act", FlowPolicy.load(folder)), ("sampler", eager)):
            found[f"{name}, {way}"] = sampled.act(asked.observations, noise=asked.noise).numpy()
    np.savez(settings["out"], **found)


def imported(settings: Mapping[str, Any]) -> None:
    """One import, the only one of this process."""
    started, computed = time.perf_counter(), time.process_time()
    exec(settings["statement"])
    say([time.perf_counter() - started, time.process_time() - computed])


def latency(settings: Mapping[str, Any]) -> None:
    """A chunk for one observation."""
    from questions import Question

    built = sampler(settings["checkpoint"], {"batch_size": 1, "backend": settings["backend"]})
    asked = Question.of_checkpoint(Path(settings["checkpoint"]))
    observations, noise = {key: value[:1] for key, value in asked.observations.items()}, asked.noise[:1]
    answer(lambda: built.act(observations, noise=noise))


class QuickClock:
    """Time passes only when the loop waits for it: what is left is what the loop itself takes."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


def ticks(settings: Mapping[str, Any]) -> None:
    """Ticks of a control loop: one is done whenever the robot is sent a command."""
    drive(settings, QuickClock(), Told().done)


def inside(settings: Mapping[str, Any]) -> None:
    """A method inside a command: once the command gets there, it is done so many times when told to."""
    owner, name = {"training_step": training_step, "update": update}[settings["method"]]()
    method = getattr(owner, name)

    def told(self: Any) -> None:
        if settings["method"] == "training_step":
            answer(lambda: method(self))
        policy = self.policy
        before = {key: value.clone() for key, value in policy.state_dict().items()}

        def again() -> None:  # from the same weights, so that many updates do not end anywhere strange
            policy.load_state_dict(before)
            method(self)

        answer(again)

    with mock.patch.object(owner, name, told):
        command(settings)


def answer(turn: Turn) -> None:
    """Do it as often as told, without end."""
    told = Told()
    while True:
        turn()
        told.done()


class Told:
    """Says ready, reads how often, and says what that took when it has been done so often; and so on."""

    def __init__(self) -> None:
        say({})
        self._listen()

    def done(self) -> None:
        """Once more."""
        self.left -= 1
        if self.left == 0:
            wall, computed = self.started
            say([time.perf_counter() - wall, time.process_time() - computed])
            self._listen()

    def _listen(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        self.left, self.started = int(line), (time.perf_counter(), time.process_time())


def say(content: object) -> None:
    os.write(SPEAK, (json.dumps(content) + "\n").encode())


JOBS = {
    "command": command, "chunks": chunks, "import": imported, "inside": inside, "latency": latency, "ticks": ticks,
}  # fmt: skip


def main() -> None:
    root, job, settings = Path(sys.argv[1]).resolve(), sys.argv[2], json.loads(sys.argv[3])
    sys.meta_path.insert(0, Checkout(root))
    sys.path[:0] = [str(root / "benchmarks"), str(QUESTIONS)]
    JOBS[job](settings)


if __name__ == "__main__":
    os.dup2(2, 1)  # what the packages print goes to stderr
    main()

"""Started by test_robot_finetuning.py: a session whose learner is killed, and then all of it, and another.

python forked_robot_finetuning.py FOLDER
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flowpolicy import FlowPolicy
from flowpolicy.control.finetuning import learner
from flowpolicy.control.finetuning.config import RobotFinetuningConfig
from flowpolicy.control.finetuning.run import finetune_robot
from flowpolicy.control.robot import EPISODE, TERMINATED, TOTAL_REWARD, RobotSpec
from flowpolicy.errors import ConfigError
from flowpolicy.finetuning.recorder import STATE_FILE
from flowpolicy.models.config import MLPConfig
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.runs import worker_process
from flowpolicy.settings import build

RATE_HZ, LENGTH = 100.0, 20


class Reaching:
    """A robot that is rewarded for commands near a target; 20 of them an episode."""

    def __init__(self) -> None:
        low = np.full(1, -1, np.float32)
        self.spec = RobotSpec(
            "reaching", {"observation": (3,)}, low, -low, RATE_HZ, (0.5,), is_hardware=False
        )
        self.steps, self.episode, self.total = 0, 0, 0.0
        self.last: Any = None
        self.on_step = lambda steps: None

    def observe(self) -> dict[str, Any]:
        seen = np.full(3, self.episode % 7 / 7, np.float32)
        return {"observation": seen, EPISODE: self.episode, TERMINATED: 0, TOTAL_REWARD: self.total}

    def act(self, action: np.ndarray) -> None:
        self.last = action.tolist()
        self.total += 1 - float(np.abs(action).mean())
        self.steps += 1
        if self.steps % LENGTH == 0:
            self.episode += 1
        self.on_step(self.steps)

    def close(self) -> None:
        pass


def main() -> None:
    folder = Path(sys.argv[1])
    logging.disable()
    torch.set_num_threads(1)
    # A forked process has everything imported; a real one starts afresh.
    worker_process.process_context = lambda *preload: multiprocessing.get_context("fork")  # type: ignore[assignment]
    FigureCanvasAgg.print_png = lambda self, path: Path(path).write_bytes(b"")  # type: ignore[method-assign]
    learner.LOOK_S = 0.05
    torch.manual_seed(0)
    config = PolicyConfig({"name": "flow_matching"}, MLPConfig(hidden=8), {"observation": (3,)}, 1, 1, 4, 4)
    FlowPolicy(config).save(folder / "base")
    settings = {
        "checkpoint": str(folder / "base"), "num_steps": 1, "device": "cpu", "inference": "thread",
        "spares": 0, "duration_s": 60.0, "video": False, "resume": True, "save_every_s": 0.1,
        "publish_every_s": 0.1,
        "control": {"priority": False, "wait_share": 0.9},
        "algorithm": {"name": "dsrl", "proposals": 2, "actor_hidden": [8]},
        "offpolicy": {"learning_starts": 20, "batch_size": 8, "members": 2, "critic_hidden": [8]},
    }  # fmt: skip
    run_dir = folder / "run"

    def session(robot: Reaching, **changes: Any) -> dict[str, Any]:
        run = finetune_robot(build(RobotFinetuningConfig, {**settings, **changes}, ""), run_dir, robot=robot)
        summary = json.loads((run_dir / "sessions" / "001" / "summary.json").read_text())
        return {"stopped": run.stopped, "last": robot.last, **(summary.get("about") or summary)["learner"]}

    def saved_episodes() -> int:
        if not (run_dir / STATE_FILE).exists():
            return 0
        with zipfile.ZipFile(run_dir / STATE_FILE) as archive:
            return json.loads(archive.read("config.json"))["progress"]["iteration"]

    # One that is refused leaves nothing behind.
    with contextlib.suppress(ConfigError):
        session(Reaching(), resume=False, control={"execute_horizon": 9})
    left = sorted(path.name for path in run_dir.iterdir())

    # Its learner is killed, and then all of it, as where the power fails.
    child = os.fork()
    if child == 0:
        os.setsid()
        robot = Reaching()
        robot.on_step = lambda steps: (
            steps == 2 * LENGTH and os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        )
        session(robot)
        os._exit(1)
    deadline = time.monotonic() + 60
    while saved_episodes() < 4:
        time.sleep(0.02)
        assert time.monotonic() < deadline
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = saved_episodes()
    robot = Reaching()
    robot.on_step = lambda steps: steps == 2 * LENGTH + 1 and os.kill(os.getpid(), signal.SIGTERM)
    report = {"left": left, "before": before, **session(robot), "saved": saved_episodes()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

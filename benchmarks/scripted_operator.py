"""An operator with a script, for benchmarks/lerobot_robot.py: what it did, and when, is kept for the judge.

In every 20 s it takes over twice, each time with a command far from where the robot is; its device cannot be read
for a moment while it is in command; it pauses the run; and it ends the episode, as a success and a failure by turns.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flowpolicy.control.operator import Intervention, Moment
from flowpolicy.control.robot import RobotSpec

CYCLE_S = 20.0
COMMANDS, UNPLUGGED, PAUSE, VERDICT = ((5.0, 9.0), (12.0, 15.0)), (7.0, 7.1), (16.0, 16.5), 18.5
"""Seconds of a cycle."""


class ScriptedOperator:
    """See the module.

    Args:
        kept: file of what it did: kind, tick, time, and of take-overs the command and the one sent before.
        seed: of the poses.
    """

    name: ClassVar[str] = "scripted"

    def __init__(self, kept: str, seed: int = 0) -> None:
        self._kept, self._rng = Path(kept), np.random.default_rng(seed)
        self._done: list[dict[str, Any]] = []
        self._pose: np.ndarray | None = None
        self._paused, self._verdicts = False, 0

    def start(self, spec: RobotSpec, period: float) -> None:
        """Nothing to open."""
        self._spec, self._period = spec, period

    def read(self, moment: Moment) -> Intervention:
        """What the script says of this tick."""
        cycle, seconds = divmod(moment.tick * self._period, CYCLE_S)
        if UNPLUGGED[0] <= seconds < UNPLUGGED[1]:
            self._note("operator error", moment)
            raise OSError("unplugged")
        commands = any(start <= seconds < end for start, end in COMMANDS)
        if commands and self._pose is None:
            low, high = self._spec.action_low, self._spec.action_high
            self._pose = self._rng.uniform(low, high).astype(np.float32)
            sent = None if moment.sent is None else moment.sent.tolist()
            self._note("take over", moment, asked=self._pose.tolist(), sent=sent)
        elif not commands and self._pose is not None:
            self._pose = None
            self._note("hand back", moment)
        pauses = PAUSE[0] <= seconds < PAUSE[1]
        if pauses and not self._paused:
            self._note("operator pause", moment)
        self._paused = pauses
        success = None
        if seconds >= VERDICT and self._verdicts <= cycle:
            success = self._verdicts % 2 == 0
            self._verdicts += 1
            self._note("episode success" if success else "episode failure", moment)
        return Intervention(self._pose, success, pauses)

    def close(self) -> None:
        """Keep what was done."""
        self._kept.write_text(json.dumps(self._done))

    def _note(self, kind: str, moment: Moment, **more: Any) -> None:
        self._done.append({"kind": kind, "tick": moment.tick, "time": time.monotonic(), **more})

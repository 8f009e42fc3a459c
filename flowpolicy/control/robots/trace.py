"""A recorded trace as a robot: its observations come again at their own times, and commands are only kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.robot import EPISODE, TIMESTAMP, Action, Observation, RobotSpec
from flowpolicy.control.system import Clock, MonotonicClock
from flowpolicy.settings import require


class TraceRobot:
    """Replays recorded episodes in real time, repeatedly.

    What the loop commands changes nothing; it is kept beside what was recorded. For trying a policy, a
    sampler or a machine without a simulator.

    Args:
        observations: key -> ``(steps, *shape)``.
        episode_ends: end of each episode in them.
        actions: recorded ``(steps, A)``; their range is the command's bounds.
        rate_hz: of the recording.
        safe_action: see :class:`~flowpolicy.control.robot.RobotSpec`.
        clock: the time.
    """

    def __init__(
        self,
        observations: Mapping[str, NDArray[Any]],
        episode_ends: NDArray[np.int64],
        actions: NDArray[np.float32],
        rate_hz: float,
        safe_action: str | tuple[float, ...] = "hold",
        *,
        name: str = "trace",
        clock: Clock | None = None,
    ) -> None:
        require(len(actions) >= 1, "trace", len(actions), "at least one step")
        self._observations = {key: np.asarray(rows) for key, rows in observations.items()}
        self._ends = np.asarray(episode_ends)
        self._clock = clock or MonotonicClock()
        self._start = self._clock.now()
        self.recorded = actions
        self.commands: list[tuple[int, Action]] = []
        shapes = {key: tuple(rows.shape[1:]) for key, rows in self._observations.items()}
        self.spec = RobotSpec(
            name, shapes, actions.min(0), actions.max(0), rate_hz, safe_action, self._start, is_hardware=False
        )

    def observe(self) -> Observation:
        """The recorded observation of this moment."""
        step = int((self._clock.now() - self._start) * self.spec.rate_hz)
        row = step % len(self.recorded)
        found: dict[str, Any] = {key: rows[row] for key, rows in self._observations.items()}
        found[TIMESTAMP] = self._start + step / self.spec.rate_hz
        lap = step // len(self.recorded)
        found[EPISODE] = lap * len(self._ends) + int(np.searchsorted(self._ends, row, side="right"))
        return found

    def act(self, action: Action) -> None:
        """Keep the command beside the recorded step it came at."""
        step = int((self._clock.now() - self._start) * self.spec.rate_hz)
        self.commands.append((step % len(self.recorded), action.copy()))

    def close(self) -> None:
        """Nothing is held."""

"""A robot, a policy, a worker and a clock that do exactly what a test says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flowpolicy.control.inference import Answer, Request, WorkerDiedError
from flowpolicy.control.robot import RobotSpec
from flowpolicy.features import features_of
from flowpolicy.spec import PolicySpec

A, T = 2, 8


class ToyPolicy:
    """The shapes of a policy; who plans is the worker."""

    def __init__(self, observation_dim: int = 3, action_dim: int = A, **images: tuple[int, ...]) -> None:
        shapes = images or {"observation": (observation_dim,)}
        self.spec = PolicySpec(features_of(shapes), 2, T, 4, action_dim)


class ToyClock:
    """Time passes only when somebody waits for it, or a test says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


class ToyRobot:
    """Shows the time, and keeps every command with the tick it came at.

    ``on_observe`` and ``on_act`` may raise, or change what is seen.
    """

    def __init__(self, clock, *, rate_hz=100.0, safe_action="zero", bound=1.0) -> None:
        low = np.full(A, -bound, np.float32)
        self.spec = RobotSpec("toy", {"observation": (3,)}, low, -low, rate_hz, safe_action)
        self.clock = clock
        self.commands: list[np.ndarray] = []
        self.on_observe: Callable = lambda observation: observation
        self.on_act: Callable = lambda action: None

    def observe(self):
        now = self.clock.now()
        return self.on_observe({"observation": np.full(3, now, np.float32), "timestamp": now})

    def act(self, action) -> None:
        self.on_act(action)
        self.commands.append(np.array(action))

    def close(self) -> None:
        pass


def encoded(request: Request) -> np.ndarray:
    """A chunk that says for which tick each action was sampled, and by which request, both over 1000."""
    ticks = request.step + np.arange(T)
    return np.stack([ticks / 1000, np.full(len(ticks), request.step / 1000)], axis=1).astype(np.float32)


class ToyWorker:
    """Answers ``delay`` polls after the request; ``fault`` may change or swallow an answer, or raise."""

    def __init__(self, delay: int = 0, sampler=encoded) -> None:
        self.delay, self.sampler = delay, sampler
        self.requests: list[Request] = []
        self.restarts = 0
        self.fault: Callable = lambda answer: answer
        self._waiting: Request | None = None
        self._polls = 0

    def submit(self, request) -> None:
        assert self._waiting is None, "one request at a time"
        self.requests.append(request)
        self._waiting, self._polls = request, 0

    def poll(self, timeout=0.0):
        if self._waiting is None:
            return None
        self._polls += 1
        if self._polls < self.delay:
            return None
        request = self._waiting
        answer = self.fault(Answer(request.step, self.sampler(request), 0.001 * self.delay))
        if answer is not None:
            self._waiting = None
        return answer

    def ready(self, timeout=0.0):
        return True

    def restart(self) -> None:
        self.restarts += 1
        self._waiting = None

    def close(self) -> None:
        pass


def died(answer):
    raise WorkerDiedError("the inference process ended")

"""What is checked before a robot moves for the first time, and the slow move to its first command."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog, name_of
from flowpolicy.control.history import ObservationHistory
from flowpolicy.control.inference import Pipeline, Worker
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.robot import PRESENT_POSE, Action
from flowpolicy.control.system import exclusive
from flowpolicy.errors import TaskError
from flowpolicy.execution.receding_horizon import ChunkPolicy

log = logging.getLogger(__name__)

WATCH_S = 1.0
"""For which observations are watched."""
STALE_SHARE = 0.05
"""Of the ticks of that time at which the newest observation may be too old."""
SAMPLES = 10
"""Chunks whose latency is measured."""
RATE_TOLERANCE = 0.02
"""Share by which the rates of loop and training may differ."""
OUTSIDE_S = 0.25
"""Seconds of the velocity limit by which the present pose may lie outside of the bounds of the commands."""
APPROACH_SHARE = 0.5
"""Of the velocity limit, for the move to the first command."""
MOST_APPROACH_S = 30.0
"""Of that move; a robot that is farther away is moved there by hand."""
SETTLE_S = 0.5
"""After the move, until the robot has followed."""
MOST_MISSES = 10
"""Ticks in a row without a valid command after which the move is given up."""


@dataclass(frozen=True)
class Check:
    """One item.

    Attributes:
        name: what is checked.
        ok: whether it holds.
        found: what was found, and the fix where it does not hold.
        is_safety: whether it is asked for even where the list is left out.
    """

    name: str
    ok: bool
    found: str
    is_safety: bool = False


class CheckList:
    """Goes through the list with a loop that has not been run yet.

    1. Limits: bounds are finite by construction; a robot that says its present pose needs a velocity limit.
    2. The loop's rate is the one that the policy was trained at.
    3. Observations are complete, and the newest is fresh at nearly every tick of a second; cameras show more
       than one picture.
    4. A chunk comes within a period, or within the delay that chunks leave room for.
    5. The first command is no farther from the present pose than the velocity limit allows in one tick; where
       it is, the robot is moved there at half that limit, through the loop's own gate, and must follow.

    Args:
        loop: with the robot, the gate and the settings.
        policy: gives observations and rate.
        worker: samples chunks; the loop's.
        complete: False leaves out what is not safety (2, the cameras' pictures, 4).
        rehearsal: nothing moves: what fails is told and not refused.

    Attributes:
        first: the policy's first command ``(A,)``, before any limit; None before :meth:`go`.
    """

    def __init__(
        self, loop: ControlLoop, policy: ChunkPolicy, worker: Worker, *, complete: bool = True,
        rehearsal: bool = False,
    ) -> None:  # fmt: skip
        self.loop, self.policy = loop, policy
        self.complete, self.rehearsal = complete, rehearsal
        self.checks: list[Check] = []
        self.first: Action | None = None
        self._events = EventLog()
        self._history = ObservationHistory(policy.spec.features, policy.spec.obs_horizon, self._events)
        self._pipeline = Pipeline(
            worker, policy.spec.chunk_shape, self._events, loop.config.start_timeout_s, loop.clock
        )
        self._pose: NDArray[np.float64] | None = None

    def go(self) -> list[Check]:
        """Check everything, tell of it, and move to the first command.

        Raises:
            TaskError: an item does not hold; the robot was not moved, unless it is the move that failed.
            FlowPolicyError: the policy was not ready in time.
        """
        self._pipeline.wait_until_ready(self.loop.config.start_timeout_s)
        with exclusive(self.loop.robot):
            self._rate()
            self._observations()
            if not self._history.is_empty:
                chunk = self._latency()
                self._limits(chunk)
                self._refuse()
                if chunk is not None:
                    self._first_command(chunk)
            self._refuse()
        return self.checks

    def content(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(check) for check in self.checks]

    def _add(self, name: str, ok: bool, found: str, *, is_safety: bool = False) -> None:
        if not (self.complete or is_safety):
            return
        self.checks.append(Check(name, ok, found, is_safety))
        log.info("%s %s: %s", "  ok " if ok else "FAILS", name, found)

    def _refuse(self) -> None:
        failed = [check for check in self.checks if not check.ok]
        if failed and not self.rehearsal:
            first = failed[0]
            skip = "" if first.is_safety else " checklist=false leaves this item out."
            raise TaskError(f"Refused before the first motion; {first.name}: {first.found}{skip}")

    def _limits(self, chunk: Action | None) -> None:
        spec = self.loop.robot.spec
        bounds = ", ".join(
            f"{name} {low:.4g} to {high:.4g}"
            for name, low, high in zip(spec.action_names, spec.action_low, spec.action_high, strict=True)
        )
        limit = self.loop.config.safety.velocity_limit
        if limit is None and self._pose is not None:
            own = 0.0 if chunk is None or len(chunk) < 2 else float(np.abs(np.diff(chunk, axis=0)).max())
            why = "no velocity limit; give control.safety.velocity_limit=UNITS_PER_SECOND"
            why += f" (a chunk of this policy moves by up to {own / self.loop.period:.3g})." if own else "."
            self._add("limits", False, why, is_safety=True)
            return
        told = "none" if limit is None else f"{limit} per second"
        self._add("limits", True, f"{bounds}; velocity limit {told}", is_safety=True)

    def _rate(self) -> None:
        rate, trained = 1 / self.loop.period, self.policy.spec.task.get("control_hz")
        if trained is None:
            self._add("rate", True, f"{rate:g} Hz; the policy does not say the rate of its demonstrations")
            return
        ok = abs(rate / float(trained) - 1) <= RATE_TOLERANCE
        fix = (
            "" if ok else f"; give control.rate_hz={float(trained):g}, or its actions play at another speed."
        )
        self._add("rate", ok, f"the loop's is {rate:g} Hz, the demonstrations' {float(trained):g} Hz{fix}")

    def _observations(self) -> None:
        loop, clock = self.loop, self.loop.clock
        ticks = max(round(WATCH_S / loop.period), 2)
        limit = loop.config.safety.max_observation_age_s
        stale, ages, moments = 0, [], set()
        pictures: Counter[str] = Counter()
        before: dict[str, Any] = {}
        moment = clock.now()
        for _ in range(ticks):
            # After a moment in which this program stood still, overdue ticks would all see one observation.
            if clock.now() - moment > loop.period:
                moment = clock.now() + loop.period
            clock.sleep_until(moment)
            moment += loop.period
            found = self._observe()
            age = self._history.age(clock.now())
            stale += not -loop.period <= age <= limit
            if np.isfinite(age):
                ages.append(age)
            if self._history.measured in moments or not found:
                continue
            moments.add(self._history.measured)
            for key, feature in self.policy.spec.features.items():
                if feature.is_frame and key in found:
                    pictures[key] += key not in before or not np.array_equal(before[key], found[key])
                    before[key] = np.array(found[key])
        told = f"{len(moments)} new ones in {ticks} ticks"
        if ages:
            told += f", the newest at most {1e3 * max(ages):.0f} ms old (limit {1e3 * limit:.0f} ms)"
        faults = ", ".join(f"{name_of(event)} {count}" for event, count in self._events.counts.items())
        told += f"; {faults}" if faults else ""
        ok = stale <= STALE_SHARE * ticks
        if not ok:
            told += f": too old at {stale} of {ticks} ticks; check bus and cameras, or raise control.safety."
            told += "max_observation_age_s"
            told += f" ({self._events.records[-1].detail})." if self._events.records else "."
        self._add("observations", ok, told, is_safety=True)
        frozen = [key for key, count in pictures.items() if count < 2 <= len(moments)]
        if pictures:
            fix = f"{', '.join(frozen)} showed the same picture for {WATCH_S:g} s; is it frozen or covered?"
            counts = ", ".join(f"{key} {count}" for key, count in pictures.items())
            self._add("cameras", not frozen, fix if frozen else f"different pictures: {counts}")

    def _observe(self) -> Mapping[str, Any]:
        """Observe once into the history; what was observed, empty where nothing was."""
        try:
            found: Any = self.loop.robot.observe()
        except Exception as error:  # a driver may raise anything
            self._events.add(Event.ROBOT_ERROR, 0, f"{type(error).__name__}: {error}"[:200])
            return {}
        self._history.add(found, 0, self.loop.clock.now())
        if not isinstance(found, Mapping):
            return {}
        pose = np.asarray(found.get(PRESENT_POSE, ()), np.float64)
        if pose.shape == self.loop.robot.spec.action_low.shape and np.isfinite(pose).all():
            self._pose = pose
        return found

    def _latency(self) -> Action | None:
        """Sample some chunks; the last one."""
        clock, period, room = self.loop.clock, self.loop.period, max(self.loop.max_delay, 1)
        seconds: list[float] = []
        chunk = None
        for _ in range(SAMPLES):
            began = clock.now()
            chunk = self._sampled()
            if chunk is None:
                break
            seconds.append(clock.now() - began)
        if chunk is None:
            why = self._events.records[-1].detail if self._events.records else "no answer"
            self._add("policy", False, f"it gives no chunk of actions: {why}.", is_safety=True)
            return None
        middle, longest = statistics.median(seconds), max(seconds)
        told = f"a chunk takes {1e3 * middle:.1f} ms (longest {1e3 * longest:.1f} ms)"
        told += f" of a period of {1e3 * period:.1f} ms"
        ok = middle <= room * period
        if ok and middle > period:
            told += f"; it comes {int(np.ceil(middle / period))} ticks late, and leaves room for {room}"
        if not ok:
            told += (
                f", and leaves room for {room} ticks alone; choose fewer num_steps, a faster backend, or a "
                "smaller control.execute_horizon (flowpolicy plan measures what keeps up)."
            )
        self._add("inference", ok, told)
        return chunk

    def _sampled(self) -> Action | None:
        """A chunk ``(T, A)`` for the newest observation; None where there is none, which is an event."""
        self._observe()
        self._pipeline.submit(0, self._history.newest(), None)
        found = self._pipeline.take(0, self.loop.config.start_timeout_s)
        return None if found is None else found[0]

    def _first_command(self, chunk: Action) -> None:
        self.first = chunk[0]
        spec, period = self.loop.robot.spec, self.loop.period
        if self._pose is None:
            told = f"the robot does not say its present pose ('{PRESENT_POSE}' of an observation): it is free"
            self._add("first command", True, told, is_safety=True)
            return
        limit = self.loop.config.safety.velocity_limit
        if limit is None:  # a rehearsal goes on
            return
        speed = np.broadcast_to(np.asarray(limit, np.float64), self._pose.shape)
        low, high = spec.action_low.astype(np.float64), spec.action_high.astype(np.float64)
        inside = np.clip(self._pose, low, high)
        outside = np.abs(self._pose - inside) / speed
        if outside.max() > OUTSIDE_S:
            worst = int(outside.argmax())
            self._add(
                "present pose", False,
                f"{spec.action_names[worst]} is at {self._pose[worst]:.4g}, outside of its limits "
                f"{low[worst]:.4g} to {high[worst]:.4g}; move it inside by hand, or widen them.",
                is_safety=True,
            )  # fmt: skip
            return
        self.loop.gate.stand_at(inside.astype(np.float32))
        target = np.clip(chunk[0].astype(np.float64), low, high)
        seconds = np.abs(target - inside) / speed
        worst = int(seconds.argmax())
        jump = (
            f"{spec.action_names[worst]} from {self._pose[worst]:.4g} to {target[worst]:.4g}, "
            f"{seconds[worst]:.2g} s at the velocity limit"
        )
        if seconds[worst] <= period:
            self._add("first command", True, f"near the present pose: {jump}", is_safety=True)
            return
        needed = seconds[worst] / APPROACH_SHARE
        if needed > MOST_APPROACH_S:
            told = f"{jump}: too far for a slow move; bring the robot nearer by hand."
            self._add("first command", False, told, is_safety=True)
            return
        if self.rehearsal:
            told = f"it would be moved there in {needed:.1f} s: {jump}"
            self._add("first command", True, told, is_safety=True)
            return
        log.info("      moving to the first command in %.1f s: %s", needed, jump)
        why = "interrupted"
        try:
            why = self._approach(inside, target, needed) or self._left_behind(inside, target, speed)
        finally:
            if why:
                self.loop.gate.send_safe(0)
        told = f"{why}: {jump}" if why else f"moved there in {needed:.1f} s: {jump}"
        self._add("first command", not why, told, is_safety=True)

    def _approach(self, start: NDArray[Any], target: NDArray[Any], seconds: float) -> str:
        """Move to ``target`` along a straight line; why it was given up, empty where it arrived."""
        loop, clock, gate = self.loop, self.loop.clock, self.loop.gate
        ticks = int(np.ceil(seconds / loop.period))
        patience = ticks + round(2 / loop.period)  # a jerk limit trails behind the line
        limit = loop.config.safety.max_observation_age_s
        begun, step, misses = clock.now(), 0, 0
        for tick in range(1, patience + 1):
            clock.sleep_until(begun + tick * loop.period)
            self._observe()
            is_fresh = self._history.age(clock.now()) <= limit
            share = min((step + 1) / ticks, 1.0)
            wanted = (start + share * (target - start)).astype(np.float32)
            sent, valid = gate.send(wanted if is_fresh else None, 0)
            step, misses = step + valid, 0 if valid else misses + 1
            if misses >= MOST_MISSES:
                return "given up, as no command was taken or the observations are too old"
            if share == 1.0 and valid and sent is not None and np.array_equal(sent, wanted):
                return ""
        return "given up, as it did not arrive"

    def _left_behind(self, start: NDArray[Any], target: NDArray[Any], speed: NDArray[Any]) -> str:
        """Which dimension did not follow the move; empty where all did."""
        loop, clock = self.loop, self.loop.clock
        begun = clock.now()
        for tick in range(1, max(round(SETTLE_S / loop.period), 1) + 1):
            clock.sleep_until(begun + tick * loop.period)
            loop.gate.send(target.astype(np.float32), 0)
            self._observe()
        assert self._pose is not None
        left, moved = np.abs(target - self._pose), np.abs(target - start)
        behind = np.flatnonzero((left > 0.5 * moved) & (left > OUTSIDE_S * speed))
        if not len(behind):
            return ""
        names = ", ".join(loop.robot.spec.action_names[dim] for dim in behind)
        return f"{names} did not follow; is its torque off, or is something in its way?"

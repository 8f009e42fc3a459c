"""The control loop: a command at every tick of an absolute schedule, whatever inference does meanwhile."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.chunks import NOTHING, Choice, Chunks, Status
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.history import ObservationHistory
from flowpolicy.control.inference import Pipeline, Worker
from flowpolicy.control.operator import Console, Moment, Operator
from flowpolicy.control.recorder import Recorder
from flowpolicy.control.robot import Action, Robot, RobotError
from flowpolicy.control.safety import SafetyGate
from flowpolicy.control.system import (
    Clock,
    DriverWatch,
    MonotonicClock,
    ending_signals,
    exclusive,
    real_time_priority,
    without_collection,
)
from flowpolicy.control.telemetry import OPERATOR, SAFE, Telemetry
from flowpolicy.data import command_source
from flowpolicy.execution.fusion import build_fusion
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.execution.rotations import Rotation
from flowpolicy.settings import require

log = logging.getLogger(__name__)

IN_COMMAND = {SAFE: command_source.SAFE, OPERATOR: command_source.OPERATOR}
"""Who was in command where a recording would not say the policy."""
CLOCK_STEP_S = 1.0
"""A tick this late is taken for a clock that was set or a machine that was suspended."""


class ControlLoop:
    """Controls a robot with a policy whose inference runs beside the loop.

    Each tick: observe; take what inference has finished; choose this tick's action among the chunks; send it
    through the safety gate; ask for the next chunk where it is due; write a row of telemetry. Ticks begin at
    absolute times, so that lateness does not add up; those that did not happen are counted.

    Chunks advance by executed actions (``status.steps``), not by ticks: whatever kept the robot from taking a
    valid command, the next command is the next action. While the robot holds, a new chunk is requested every
    T_e ticks, and at once when observations are fresh again or ticks were missed, so that no chunk becomes
    outdated in a pause; until the new chunk arrives, the old one goes on.

    An operator who takes command is obeyed in the same tick, within the same limits. Chunks are then dropped,
    and new ones requested without a pause, from what the operator's commands led to: when command is given
    back, the newest of them goes on, or the robot holds until there is one.

    Where no chunk covers a step the faster sampler's chunk is used, if there is one, and otherwise the
    robot's safe action. Too many of those in a row stop the robot.

    Args:
        robot: is controlled, not closed.
        policy: gives the horizons and observation shapes.
        worker: samples chunks.
        config: settings.
        fast: a worker of a faster sampler of the same policy, or None.
        dead_man: called at every tick; False sends the safe action.
        operator: may take command at any tick; it is opened and closed by :meth:`run`.
        recorder: keeps the episodes; it is not closed.
        clock: the time.
        events: log to add to; a new one where None.

    Raises:
        TaskError: the policy does not fit the robot.
        ConfigError: a chunk would end before the next one may arrive.
    """

    def __init__(
        self, robot: Robot, policy: ChunkPolicy, worker: Worker, config: ControlConfig, *,
        fast: Worker | None = None, dead_man: Callable[[], bool] | None = None,
        operator: Operator | None = None, recorder: Recorder | None = None, clock: Clock | None = None,
        events: EventLog | None = None,
    ) -> None:  # fmt: skip
        spec = robot.spec
        spec.check(policy)
        self.robot, self.config = robot, config
        self.clock = clock or MonotonicClock()
        self.events = events or EventLog()
        self.status = Status()
        self.period = 1.0 / (config.rate_hz or spec.rate_hz)
        if spec.heartbeat_s is not None:
            require(
                2 * self.period <= spec.heartbeat_s, "control.rate_hz", 1 / self.period,
                f"at least {2 / spec.heartbeat_s:g}, as the robot takes its safe action by itself after "
                f"{spec.heartbeat_s:g} s without a command",
            )  # fmt: skip
        horizon = policy.spec.action_horizon
        own = policy.spec.execute_horizon
        self.execute_horizon = own if config.execute_horizon is None else config.execute_horizon
        left = max(horizon - self.execute_horizon, 0)
        self.max_delay = left if config.max_delay is None else config.max_delay
        width = spec.action_high - spec.action_low
        self._width = np.where(width > 0, width, 1.0).astype(np.float32)
        rotations = dict.fromkeys((*spec.rotations, *Rotation.of(policy.spec.rotations)))
        fusion = build_fusion(
            config.fusion, horizon, self.execute_horizon, self.max_delay, self._width, tuple(rotations)
        )
        self._dead_man = dead_man
        asked = None if dead_man is None else self._ask_dead_man
        self.gate = SafetyGate(robot, config.safety, self.events, self.period, asked)
        self._operator, self._recorder = operator, recorder
        self._is_operable = False  # the operator's device is open
        self._console = None if operator is None else Console(operator, self.events, spec.action_dim)
        self._awaits_reset = False  # the operator ended the episode, and the robot's world is to be reset
        self._reset_asked = 0  # at which tick
        self._driver = DriverWatch(
            config.driver_timeout_s, self._driver_hangs, lambda: bool(self.status.stopped)
        )
        self.telemetry = Telemetry(config.telemetry_ticks, spec.action_dim)
        self.history = ObservationHistory(policy.spec.features, policy.spec.obs_horizon, self.events)
        shape = (horizon, spec.action_dim)
        timeout = config.hang_timeout(self.period, left)
        self.chunks = Chunks(
            Pipeline(worker, shape, self.events, timeout, self.clock),
            None if fast is None else Pipeline(fast, shape, self.events, timeout, self.clock),
            fusion, self.status, self.events,
            execute_horizon=self.execute_horizon, max_delay=self.max_delay,
            budget_s=config.wait_share * self.period, fast_lead=config.fast_lead,
        )  # fmt: skip
        self._holds = True  # the last tick executed nothing
        self._last: Action | None = None  # sent at the last tick
        self._sent: Action | None = None  # sent last
        self._last_number = -1

    def run(self, ticks: int | None = None) -> Status:
        """Run for a number of ticks, or until it is stopped; the robot is left with its safe action.

        In the main thread SIGINT, SIGTERM, SIGHUP and SIGQUIT end the loop as :meth:`stop` does, and do not
        end the program: ``status.signal`` says which came, and the caller closes what it has opened.

        Returns:
            The status; ``stopped`` is ``finished``, ``interrupted`` (by SIGTERM, ...) or the watchdog's
            sentence.

        Raises:
            FlowPolicyError: the policy was not ready in time, or another loop controls the robot.
        """
        self.chunks.wait_until_ready(self.config.start_timeout_s)
        with (
            exclusive(self.robot),
            self.operating(),
            without_collection(),
            real_time_priority(self.config.priority),
            self._driver.watching(),
            ending_signals(self._on_signal),
        ):
            self._driver.enter("")  # of what went through the gate before
            try:
                self._run(ticks)
            except KeyboardInterrupt:
                self.status.stopped = self.status.stopped or "interrupted"
            finally:
                self._driver.enter("act")
                with suppress(KeyboardInterrupt):  # it hangs in this too
                    self.gate.send_safe(self.status.tick)
                self._driver.enter("")
        return self.status

    @contextmanager
    def operating(self) -> Iterator[None]:
        """Open the operator's device for the block, if it is not open; :meth:`run` does so by itself.

        Raises:
            ConfigError: it cannot be opened, or does not fit the robot.
        """
        operator = self._operator
        if operator is None or self._is_operable:
            yield
            return
        try:
            operator.start(self.robot.spec, self.period)
            self._is_operable = True
            yield
        finally:
            self._is_operable = False
            try:
                operator.close()
            except Exception as error:  # a device that is gone; what the run leaves must not be lost by it
                log.error("The operator's device could not be closed (%s).", error)

    def _on_signal(self, number: int) -> None:
        status = self.status
        if not status.stopped:
            by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
            status.signal, status.stopped = number, f"interrupted{by}"
        if self._driver.hanging():
            raise KeyboardInterrupt

    def _ask_dead_man(self) -> bool:
        """From the gate, before it commands the robot: a switch that hangs is no robot that hangs."""
        assert self._dead_man is not None
        self._driver.enter("dead_man")
        try:
            return self._dead_man()
        finally:
            self._driver.enter("act")

    def _driver_hangs(self, call: str, is_first: bool) -> None:
        """From the watchdog's thread: ``call`` does not return to the loop's."""
        tick = self.status.tick
        if is_first:
            sentence = f"{call} has not returned for {self.config.driver_timeout_s:g} s"
            self.events.add(Event.DRIVER_HANG, tick, sentence)
        if call != "act":  # a driver that is inside act cannot be commanded
            self.gate.send_safe(tick)

    def stop(self, reason: str = "stopped") -> None:
        """End the loop at the next tick."""
        self.status.stopped = reason

    def _run(self, ticks: int | None) -> None:
        origin, tick = self._origin(), 0
        status = self.status
        while not status.stopped:
            if ticks is not None and tick >= ticks:
                status.stopped = "finished"
                break
            deadline = origin + tick * self.period
            ahead = deadline - self.clock.now()
            if ahead > 2 * self.period:  # the clock went backwards: waiting for it would be silence
                self._clock_stepped(tick, -ahead)
                origin -= ahead
                deadline -= ahead
            self.clock.sleep_until(deadline)
            now = self.clock.now()
            if now - deadline > CLOCK_STEP_S:
                self._clock_stepped(tick, now - deadline)
            missed = int((now - deadline) / self.period)
            if missed:
                if ticks is not None:  # late at its end, a run has no tick more than it was to have
                    missed = min(missed, ticks - tick)
                self.events.add(
                    Event.DEADLINE_MISSED, tick, f"late by {1e3 * (now - deadline):.1f} ms", missed
                )
                self.chunks.is_due = True
                tick += missed
                deadline += missed * self.period
                if tick == ticks:
                    continue
            status.tick = tick
            self._tick(tick, deadline, now)
            tick += 1

    def _clock_stepped(self, tick: int, seconds: float) -> None:
        self.events.add(Event.CLOCK_STEP, tick, f"{seconds:+.3f} s")
        self.chunks.clock_stepped(seconds)

    def _origin(self) -> float:
        """The first deadline: half a period after a step of the robot's own clock, where it has one."""
        soon = self.clock.now() + self.period
        own = self.robot.spec.origin
        if own is None:
            return soon
        steps = np.ceil((soon - own) / self.period - 0.5)
        return float(own + (steps + 0.5) * self.period)

    def _tick(self, tick: int, deadline: float, now: float) -> None:
        self._observe(tick, now)
        age = self.history.age(now)
        fresh = -self.period <= age <= self.config.safety.max_observation_age_s
        if not fresh and not self.history.is_empty:
            self.events.add(Event.OBSERVATION_STALE, tick, f"{age:.3f} s old")
        self.chunks.is_due |= not fresh
        arrived, seconds = self.chunks.collect(
            tick, self.history, may_ask=fresh and not self._is_paused, holds=self._holds,
            operated=self._is_operated,
        )  # fmt: skip
        choice = self.chunks.choose(tick) if fresh and not self._awaits_reset else NOTHING
        row = {} if self._console is None and self._recorder is None else self.history.row()
        if self._console is not None:
            choice = self._intervened(self._console, choice, tick, fresh, row)
        command, source, number, step = choice
        seam = float("nan")
        if command is not None and number != self._last_number and self._last is not None:
            change = (command - self._last) / self._width
            seam = math.sqrt(float(change @ change) / change.size)
        self._driver.enter("act")
        sent, valid = self.gate.send(command, tick)
        self._driver.enter("")
        self._holds = not valid
        self.status.steps += valid
        if not valid:
            source = SAFE
        self._last, self._last_number = sent, number
        self._sent = self._sent if sent is None else sent
        if self._recorder is not None:
            who = IN_COMMAND.get(source, command_source.POLICY)
            self._recorder.step(tick, row, sent, who, self.history.total_reward)
        self._watch((command is None or sent is None) and not self._may_rest(tick), tick)
        if not self._is_paused:
            self.chunks.ask_fast(tick, self.history, fresh=fresh)
        action: Any = sent if sent is not None else np.nan
        self.telemetry.add(
            tick, deadline, now, self.clock.now(), age, seconds, arrived, number, step, source, seam,
            self.events.take_bits(), action,
        )  # fmt: skip

    def _observe(self, tick: int, now: float) -> None:
        self._driver.enter("observe")
        try:
            observation = self.robot.observe()
        except Exception as error:  # a driver may raise anything
            count = error.count if isinstance(error, RobotError) else 1
            self.events.add(Event.ROBOT_ERROR, tick, f"observe: {type(error).__name__}: {error}"[:200], count)
            return
        finally:
            self._driver.enter("")
        if self.history.add(observation, tick, now):
            self.events.add(Event.EPISODE, tick)
            if not self._awaits_reset:
                self._judge(self.history.success, tick, terminated=self.history.terminated)
            self._awaits_reset = False
            self.gate.forget_hold()
            self.chunks.drop()

    def _judge(self, success: bool | None, tick: int, *, terminated: bool = False) -> None:
        """The episode has ended."""
        if success is not None:
            self.events.add(Event.EPISODE_SUCCESS if success else Event.EPISODE_FAILURE, tick)
        if self._recorder is not None:
            self._recorder.end_episode(success, self.history.total_reward, terminated=terminated)

    def _end_episode(self, success: bool, tick: int) -> None:
        """The operator says that it is over."""
        self._judge(success, tick)
        self.chunks.drop()
        self.history.restart()
        end = getattr(self.robot, "end_episode", None)
        if end is not None:
            self._driver.enter("end_episode")
            try:
                end()
                self._awaits_reset, self._reset_asked = True, tick
            except Exception as error:  # a driver may raise anything
                line = f"end_episode: {type(error).__name__}: {error}"[:200]
                self.events.add(Event.ROBOT_ERROR, tick, line)
            self._driver.enter("")

    def _intervened(
        self, console: Console, choice: Choice, tick: int, fresh: bool, row: Mapping[str, NDArray[Any]]
    ) -> Choice:
        """The tick's choice after the operator was asked."""
        commanded = console.commands
        self._driver.enter("operator")
        found = console.ask(Moment(tick, row, choice[0], self._sent))
        self._driver.enter("")
        if found is None or self._awaits_reset:
            return NOTHING
        if found.success is not None:
            self._end_episode(found.success, tick)
            return NOTHING
        if found.pause or (console.commands and not commanded):
            self.chunks.drop()
        if not console.commands:
            return NOTHING if found.pause else choice
        # So that a chunk from where this leads is at hand when command is given back.
        self.chunks.is_due = True
        return found.action if fresh else None, OPERATOR, -1, -1

    def _may_rest(self, tick: int) -> bool:
        """Whether nothing is missed where nothing is sent: in a pause, and until the world is reset."""
        waited = (tick - self._reset_asked) * self.period
        return self._is_paused or (self._awaits_reset and waited < self.config.start_timeout_s)

    @property
    def _is_paused(self) -> bool:
        return self._console is not None and self._console.pauses

    @property
    def _is_operated(self) -> bool:
        return self._console is not None and self._console.commands

    def _watch(self, missed: bool, tick: int) -> None:
        status, patience = self.status, self.config.start_timeout_s
        if not status.chunks:
            reason = f"no chunk came within {patience:g} s" if tick * self.period > patience else ""
        else:
            status.misses = status.misses + 1 if missed else 0
            is_lost = status.misses >= self.config.safety.miss_limit
            reason = f"watchdog: no valid command in {status.misses} ticks in a row" if is_lost else ""
        if reason:
            status.stopped = reason
            self.events.add(Event.WATCHDOG_STOP, tick, reason)

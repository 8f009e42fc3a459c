"""The loop on a clock of its own: which action reaches the robot at which tick, whatever goes wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from control_toys import A, ToyClock, ToyPolicy, ToyRobot, ToyWorker, died

from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.safety import SafetyConfig
from flowpolicy.control.telemetry import CHUNK, FAST, PREVIOUS, SAFE
from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.features import Task, Vector

DEFAULTS = ControlConfig(priority=False, wait_share=0.0)


def build(worker, config=DEFAULTS, *, robot=None, policy=None, **settings):
    clock = robot.clock if robot is not None else ToyClock()
    robot = robot or ToyRobot(clock)
    if settings:
        config = dataclasses.replace(
            config, **{name: value for name, value in settings.items() if name not in ("fast", "dead_man")}
        )
    more = {name: settings[name] for name in ("fast", "dead_man") if name in settings}
    return robot, ControlLoop(robot, policy or ToyPolicy(), worker, config, clock=clock, **more)


def planned_ticks(robot):
    """The tick that each command was sampled for (see ``toys.encoded``), and the request it came from."""
    return [(round(1000 * float(c[0])), round(1000 * float(c[1]))) for c in robot.commands]


def test_actions_are_counted_from_their_observation_whatever_the_delay():
    for delay in (1, 2, 4):
        robot, loop = build(ToyWorker(delay))
        loop.run(40)
        rows = loop.telemetry.rows()
        sent = planned_ticks(robot)[:-1]  # the last is the safe action at the end
        first = delay  # ticks before the first chunk: the safe action
        assert sent[:first] == [(0, 0)] * first
        assert [step for step, _ in sent[first:]] == list(range(40 - first))
        assert rows["delay"][rows["delay"] >= 0].tolist()[0] == 0  # nothing was executed before the first
        assert set(rows["delay"][rows["delay"] >= 0][1:]) == {delay}
        assert set(rows["source"][first:]) == {CHUNK}
        # A chunk is asked for after every fourth action and used as soon as it is there.
        assert all(request == max(4 * ((step - delay) // 4), 0) for step, request in sent[first:])


@pytest.mark.parametrize("pause", ["dead man", "stale", "act raises", "missed ticks", "episode"])
@pytest.mark.parametrize("delay", [1, 8])
def test_after_a_pause_the_next_action_is_the_next_one(pause, delay):
    clock = ToyClock()
    robot = ToyRobot(clock)
    frozen = {}

    def observe(observation):
        if pause == "stale" and 30 <= loop.status.tick < 64:
            return frozen.setdefault("last", observation)
        return {**observation, "episode": int(pause == "episode" and loop.status.tick >= 30)}

    def act(action):
        if pause == "act raises" and 30 <= loop.status.tick < 44:
            raise OSError("cable")
        if pause == "missed ticks" and loop.status.tick == 30:
            clock.time += 0.14

    robot.on_observe, robot.on_act = observe, act
    dead_man = None if pause != "dead man" else lambda: not 30 <= loop.status.tick < 44
    config = dataclasses.replace(DEFAULTS, execute_horizon=8, fusion="switch")
    policy = ToyPolicy()
    policy.spec = dataclasses.replace(policy.spec, action_horizon=16)

    def plan(request):
        return np.repeat((request.step + np.arange(16.0))[:, None] / 1000, A, 1).astype(np.float32)

    worker = ToyWorker(delay, plan)
    robot, loop = build(worker, config, robot=robot, policy=policy, dead_man=dead_man)
    loop.run(90)
    rows = loop.telemetry.rows()
    steps = np.rint(1000 * rows["action"][rows["source"] == CHUNK, 0]).astype(int)
    assert steps.tolist() == list(range(len(steps)))
    assert loop.status.steps == len(steps) > 30
    later = [request.step for request in worker.requests if request.step > steps[25]]
    assert later  # and it is sampled again from what is observed after the pause


def test_while_the_robot_holds_its_plan_is_renewed():
    robot = ToyRobot(ToyClock())
    worker = ToyWorker(1)
    robot, loop = build(worker, robot=robot, dead_man=lambda: not 20 <= loop.status.tick < 60)
    loop.run(62)
    during = [r.observation["observation"][-1, 0] for r in worker.requests if r.step == 19]
    assert len(during) >= 40 // 4 - 1
    assert max(during) >= robot.clock.time - 0.01 * (4 + 3)  # sampled from the observation at its end


def test_a_chunk_that_is_waited_for_has_no_delay():
    worker = ToyWorker(0)
    _, loop = build(worker, wait_share=0.3)
    loop.run(20)
    delays = loop.telemetry.rows()["delay"]
    assert list(delays[:6]) == [-1, 0, -1, -1, -1, 0]  # the first one's duration is not known yet


def test_ticks_keep_an_absolute_schedule_and_every_missed_one_is_counted():
    clock = ToyClock()
    robot = ToyRobot(clock)
    slow = {3: 0.0049, 7: 0.0251, 12: 0.1003}  # seconds that a command takes at these ticks

    def act(action):
        clock.time += slow.get(loop.status.tick, 0.0)

    robot.on_act = act
    robot, loop = build(ToyWorker(1), robot=robot)
    loop.run(60)
    rows = loop.telemetry.rows()
    assert loop.events.counts[Event.DEADLINE_MISSED] == 1 + 9
    assert sorted(set(range(60)) - set(rows["tick"].tolist())) == [8, *range(13, 22)]
    np.testing.assert_allclose(rows["deadline"] - rows["deadline"][0], rows["tick"] / 100, atol=1e-9)
    late = rows["started"] - rows["deadline"]
    assert (late >= -1e-12).all()
    assert (late < 0.01).all()
    assert [step for step, _ in planned_ticks(robot)[1:-1]] == list(range(49))  # nothing is left out


def test_a_run_that_is_late_at_its_end_has_no_tick_beyond_it():
    clock = ToyClock()
    robot = ToyRobot(clock)

    def act(action):
        if loop.status.tick == 57:
            clock.time += 0.0751

    robot.on_act = act
    robot, loop = build(ToyWorker(1), robot=robot)
    loop.run(60)
    assert loop.status.stopped == "finished"
    assert loop.telemetry.rows()["tick"].tolist() == list(range(58))
    assert loop.events.counts[Event.DEADLINE_MISSED] == 2
    assert len(robot.commands) == 58 + 1  # the safe action at the end


def test_a_late_chunk_is_bridged_by_the_previous_one_then_the_fast_one_then_the_safe_action():
    worker, fast = ToyWorker(1), ToyWorker(1)
    robot, loop = build(worker, max_delay=2, fast=fast, execute_horizon=4)
    worker.fault = lambda answer: answer if answer.step < 8 else None  # no answer to the third request
    fast.fault = lambda answer: answer if answer.step < 15 else None  # and then none of the fast sampler's
    loop.run(40)
    source = loop.telemetry.rows()["source"]
    # Step k is executed at tick k + 1. That of step 4 ends with 11; the one asked for at 8 was due at 10.
    assert list(source[6:11]) == [CHUNK] * 5
    assert list(source[11:13]) == [PREVIOUS] * 2
    fast_ticks = np.flatnonzero(source == FAST)
    assert fast_ticks.tolist() == list(range(13, 13 + len(fast_ticks)))
    assert len(fast_ticks) >= ToyPolicy().spec.action_horizon - 3
    assert set(source[13 + len(fast_ticks) :]) == {SAFE}
    assert loop.events.counts[Event.INFERENCE_LATE] == 1
    assert (np.array(robot.commands[13 + len(fast_ticks) : 40]) == 0).all()


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        (lambda a: dataclasses.replace(a, actions=np.full_like(a.actions, np.nan)), Event.ACTION_INVALID),
        (lambda a: dataclasses.replace(a, actions=np.full_like(a.actions, np.inf)), Event.ACTION_INVALID),
        (lambda a: dataclasses.replace(a, actions=a.actions[:, :1]), Event.ACTION_INVALID),
        (lambda a: dataclasses.replace(a, actions=None, error="RuntimeError: no"), Event.INFERENCE_ERROR),
        (died, Event.INFERENCE_DIED),
        (lambda a: None, Event.INFERENCE_HANG),
    ],
)
def test_an_insane_policy_leads_to_the_safe_action_one_tick_after_the_last_valid_one(fault, event):
    worker = ToyWorker(1)
    robot, loop = build(worker, hang_timeout_s=0.055, safety=SafetyConfig(miss_limit=1000))
    worker.fault = lambda a: fault(a) if a.step >= 8 and loop.status.tick < 60 else a
    loop.run(120)
    rows = loop.telemetry.rows()
    commands = np.array(robot.commands)
    assert np.isfinite(commands).all()
    assert loop.events.counts[event] >= 1
    # The last valid chunk, of step 4, ends with step 11 at tick 12; the next already has the safe action.
    safe = np.flatnonzero(rows["source"] == SAFE)
    assert rows["tick"][safe[safe > 1][0]] == 13
    assert (commands[safe[safe > 1]] == 0).all()
    assert set(rows["source"][-20:]) == {CHUNK}  # it recovers as soon as the policy does
    mended = event in (Event.INFERENCE_DIED, Event.INFERENCE_HANG)
    assert (worker.restarts > 0) == mended


def test_the_watchdog_stops_after_the_declared_number_of_misses():
    worker = ToyWorker(1)
    robot, loop = build(worker, safety=SafetyConfig(miss_limit=7))
    worker.fault = lambda answer: dataclasses.replace(answer, actions=None) if answer.step else answer
    status = loop.run(1000)
    assert status.stopped == "watchdog: no valid command in 7 ticks in a row"
    assert status.tick == 9 + 6  # the first chunk ends with tick 8
    assert loop.events.counts[Event.WATCHDOG_STOP] == 1
    assert (robot.commands[-1] == 0).all()


def test_no_chunk_at_all_stops_it_too():
    worker = ToyWorker(1)
    worker.fault = lambda answer: None
    _, loop = build(worker, start_timeout_s=0.5, hang_timeout_s=1.0)
    assert "no chunk" in loop.run(1000).stopped


def test_stale_missing_and_broken_observations_stop_the_policy_but_not_the_loop():
    clock = ToyClock()
    robot = ToyRobot(clock)
    frozen = {}

    def observe(observation):
        tick = loop.status.tick
        if 20 <= tick < 60:  # the sensor froze
            return frozen.setdefault("last", observation)
        if 70 <= tick < 75:
            return {"observation": np.full(3, np.nan)}
        if 75 <= tick < 80:
            return {"observation": np.zeros(4)}
        if 80 <= tick < 85:
            return {}
        if 85 <= tick < 90:
            raise OSError("bus")
        return observation

    robot.on_observe = observe
    robot, loop = build(ToyWorker(1), robot=robot, safety=SafetyConfig(max_observation_age_s=0.105))
    loop.run(110)
    source = loop.telemetry.rows()["source"]
    assert set(source[1:31]) == {CHUNK}
    assert set(source[31:60]) == {SAFE}
    assert loop.events.counts[Event.OBSERVATION_STALE] == 29 + 10  # ticks 80 to 89 too
    for event, count in (
        (Event.OBSERVATION_INVALID, 10),
        (Event.OBSERVATION_MISSING, 5),
        (Event.ROBOT_ERROR, 5),
    ):
        assert loop.events.counts[event] == count
    assert set(source[-15:]) == {CHUNK}
    assert np.isfinite(robot.commands).all()


@pytest.mark.parametrize(
    "broken",
    [
        [1, 2, 3], np.zeros(3), "text", 7, {"observation": None}, {"observation": "1 2 3"},
        {"observation": [[1], [2, 3]]}, {"observation": [10**400, 0, 0]},
        {"observation": np.zeros(3, complex)}, {"observation": np.array([object()] * 3)},
        {"observation": np.full(3, 1e300)},
        *({"observation": np.zeros(3), "timestamp": value} for value in (
            None, "now", 10**400, [1.0, 2.0], float("nan"), float("-inf"), 1e30)),
        *({"observation": np.zeros(3), "episode": value} for value in (np.zeros(2), [1], float("nan"))),
    ],
)  # fmt: skip
def test_whatever_a_driver_hands_over_is_an_event_and_no_end(broken):
    robot = ToyRobot(ToyClock())
    robot.on_observe = lambda observation: broken if 20 <= loop.status.tick < 60 else observation
    robot, loop = build(ToyWorker(1), robot=robot, safety=SafetyConfig(max_observation_age_s=0.105))
    assert loop.run(90).stopped == "finished"
    counts, source = loop.events.counts, loop.telemetry.rows()["source"]
    assert counts[Event.OBSERVATION_INVALID] + counts[Event.OBSERVATION_STALE] >= 40
    assert counts[Event.OBSERVATION_STALE] >= 25
    assert set(source[35:60]) == {SAFE}
    assert set(source[-25:]) == {CHUNK}


def test_a_robot_that_throws_is_counted_and_a_lost_one_is_stopped():
    clock = ToyClock()
    robot = ToyRobot(clock)

    def act(action):
        if loop.status.tick % 5 == 3 or loop.status.tick >= 40:
            raise ConnectionError("cable")

    robot.on_act = act
    robot, loop = build(ToyWorker(1), robot=robot, safety=SafetyConfig(miss_limit=10))
    status = loop.run(100)
    assert "watchdog" in status.stopped
    assert status.tick == 49
    assert loop.events.counts[Event.ROBOT_ERROR] >= 8 + 10


@pytest.mark.parametrize("step", [-50.0, 3.0])
def test_a_clock_that_steps_neither_silences_the_loop_nor_sends_old_actions(step):
    clock = ToyClock()
    robot = ToyRobot(clock)
    steps = [step]

    def act(action):
        if loop.status.tick == 20 and steps:
            clock.time += steps.pop()

    robot.on_act = act
    worker = ToyWorker(2)
    robot, loop = build(worker, robot=robot)
    loop.run(420)
    assert worker.restarts == 0  # a request is not older because the clock was set
    assert loop.events.counts[Event.CLOCK_STEP] == 1
    rows = loop.telemetry.rows()
    commands = np.array(robot.commands)[: len(rows)]
    executed = rows["source"] == CHUNK
    np.testing.assert_allclose(1000 * commands[executed, 0], np.arange(executed.sum()), atol=1e-3)
    assert set(rows["source"][-50:]) == {CHUNK}


def test_the_dead_man_switch_is_asked_before_every_command():
    held = {"now": True}

    def switch():
        if held["now"] is None:
            raise OSError("no joystick")
        return held["now"]

    robot, loop = build(ToyWorker(1), dead_man=switch)
    original = robot.on_act

    def act(action):
        held["now"] = {30: False, 60: None, 90: True}.get(loop.status.tick, held["now"])
        original(action)

    robot.on_act = act
    loop.run(120)
    source = loop.telemetry.rows()["source"]
    assert set(source[31:91]) == {SAFE}
    assert set(source[91:]) == {CHUNK}
    assert loop.events.counts[Event.DEAD_MAN] == 60
    assert (np.array(robot.commands[31:91]) == 0).all()


def test_a_new_episode_forgets_chunks_history_and_answers_under_way():
    clock = ToyClock()
    robot = ToyRobot(clock, safe_action="hold")
    robot.on_observe = lambda observation: {**observation, "episode": int(loop.status.tick >= 30)}
    worker = ToyWorker(3)
    robot, loop = build(worker, robot=robot)
    loop.run(60)
    rows = loop.telemetry.rows()
    assert loop.events.counts[Event.EPISODE] == 1
    # The chunk asked for at tick 28 is thrown away; until the first of the new episode nothing is sent, since
    # there is nothing to hold.
    first = int(rows["tick"][(rows["tick"] >= 30) & (rows["source"] == CHUNK)][0])
    assert np.isnan(rows["action"][30:first]).all()
    after = next(request for request in worker.requests if request.step == 27)  # executed before the episode
    assert planned_ticks(robot)[27] == (27, 27)
    assert first >= 33
    began = loop.telemetry.rows()["deadline"][30]  # the toy's observation is the time
    assert (after.observation["observation"] >= began - 1e-4).all()


def test_hold_repeats_the_last_valid_command():
    clock = ToyClock()
    robot = ToyRobot(clock, safe_action="hold")
    worker = ToyWorker(1)
    robot, loop = build(worker, robot=robot)
    worker.fault = lambda answer: answer if answer.step < 8 else None
    loop.run(60)
    held = np.array(robot.commands[-30:])
    assert (held == held[0]).all()
    assert round(1000 * float(held[0, 0])) == 11


def test_the_gate_is_the_only_way_to_the_robot():
    """Random chunks far out of bounds and limits: every command that arrives is within all of them."""
    rng = np.random.default_rng(0)
    worker = ToyWorker(1, lambda request: rng.normal(0, 5, (8, A)).astype(np.float32))
    clock = ToyClock()
    limits = SafetyConfig(velocity_limit=(30.0, 10.0), jerk_limit=4e5)
    robot, loop = build(worker, robot=ToyRobot(clock, bound=0.8), safety=limits)
    loop.run(2000)
    commands = np.array(
        robot.commands[1:-1], dtype=np.float64
    )  # the safe actions at both ends are not limited
    assert np.abs(commands).max() <= 0.8 + 1e-6
    velocity = np.abs(np.diff(commands, axis=0)) * 100
    assert (velocity.max(0) <= np.array([30.0, 10.0]) + 1e-3).all()
    for event in (Event.LIMIT_BOUNDS, Event.LIMIT_VELOCITY, Event.LIMIT_JERK):
        assert loop.events.counts[event] > 0


def test_jerk_is_limited_where_nothing_else_is():
    worker = ToyWorker(1, lambda r: np.full((8, A), 0.1 * (-1) ** (r.step // 4), np.float32))
    robot, loop = build(worker, safety=SafetyConfig(jerk_limit=2e4), robot=ToyRobot(ToyClock(), bound=100.0))
    loop.run(200)
    commands = np.array(robot.commands[1:-1], dtype=np.float64)
    jerk = np.diff(commands, n=3, axis=0) * 100**3
    assert np.abs(jerk).max() <= 2e4 * (1 + 1e-2)  # commands are float32
    assert loop.events.counts[Event.LIMIT_JERK] > 0
    assert np.abs(commands).max() < 0.2  # and no speed is built up


def test_a_robot_may_say_of_what_kind_its_observations_are():
    spec = dataclasses.replace(ToyRobot(ToyClock()).spec, observation_shapes={"observation": Vector((3,))})
    spec.check(ToyPolicy())
    with pytest.raises(TaskError, match=r"toy gives 'observation' of shape .*task.*takes .*vector"):
        dataclasses.replace(spec, observation_shapes={"observation": Task((3,))}).check(ToyPolicy())


def test_a_policy_that_does_not_fit_is_refused():
    other, blind = ToyPolicy(action_dim=3), ToyPolicy(camera=(4, 4, 3))
    for policy, words in ((other, r"takes actions of shape \(2,\)"), (blind, "'camera'")):
        with pytest.raises(TaskError, match=words):
            build(ToyWorker(), policy=policy)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"execute_horizon": 6, "max_delay": 3}, "at most the chunk length 8"),
        ({"fusion": "swich"}, "did you mean 'switch'"),
        ({"rate_hz": 2000.0}, "between 1 and 1000"),
        ({"safety": SafetyConfig(velocity_limit=(1.0, 2.0, 3.0))}, "velocity_limit"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build(ToyWorker(), **settings)

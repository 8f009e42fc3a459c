"""An operator takes command, gives it back, judges episodes; what was done is recorded."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from control_toys import A, ToyClock, ToyPolicy, ToyRobot, ToyWorker

from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.operator import Intervention, Moment
from flowpolicy.control.operators.choosing import build_operator
from flowpolicy.control.operators.function import FunctionOperator
from flowpolicy.control.operators.lerobot import LeRobotTeleoperator
from flowpolicy.control.recorder import Recorder
from flowpolicy.control.robot import EPISODE, SUCCESS
from flowpolicy.control.run import run_control
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.safety import SafetyConfig
from flowpolicy.control.system import MonotonicClock
from flowpolicy.control.telemetry import OPERATOR, SAFE
from flowpolicy.data import command_source
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import ConfigError
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.settings import build as build_settings

FAR = np.full(A, 0.9, np.float32)


def build(function, *, delay=1, record=None, robot=None, **safety):
    robot = robot or ToyRobot(ToyClock(), safe_action="hold")
    events = EventLog()
    config = ControlConfig(priority=False, wait_share=0.0, safety=SafetyConfig(**safety))
    recorder = None if record is None else Recorder(record, ToyPolicy().spec.features, events)
    loop = ControlLoop(
        robot, ToyPolicy(), ToyWorker(delay), config, operator=FunctionOperator(function), clock=robot.clock,
        recorder=recorder, events=events,
    )  # fmt: skip
    return robot, loop, recorder


def between(first, end, action=FAR):
    return lambda moment: action if first <= moment.tick < end else None


@pytest.mark.parametrize("delay", [1, 3])
def test_a_take_over_reaches_the_robot_in_its_tick_and_nothing_jumps(delay):
    _, loop, _ = build(between(20, 40), delay=delay, velocity_limit=1.0)  # 0.01 a tick
    loop.run(60)
    rows = loop.telemetry.rows()
    assert (rows["source"][20:40] == OPERATOR).all()
    assert OPERATOR not in rows["source"][[*range(20), *range(40, 60)]]
    sent = rows["action"][:, 0]
    step = np.diff(sent[delay:])
    assert np.abs(step).max() <= 0.01 + 1e-6
    assert step[20 - delay - 1] == pytest.approx(0.01, abs=1e-6)  # on its way in the very tick
    assert loop.events.counts[Event.TAKE_OVER] == loop.events.counts[Event.HAND_BACK] == 1


def test_after_the_hand_back_a_chunk_goes_on_from_what_was_executed():
    _, loop, _ = build(between(20, 40), delay=2)
    loop.run(60)
    rows = loop.telemetry.rows()
    assert (rows["source"][40:] != SAFE).all()  # one is at hand at once
    planned = np.round(1000 * rows["action"][40:, 0]).astype(int)
    assert planned.tolist() == [tick - 2 for tick in range(40, 60)]  # two ticks had nothing to execute
    requests = np.round(1000 * rows["action"][40:, 1])
    assert (requests >= 18).all()  # no chunk from before the take-over


def test_an_operator_that_cannot_be_read_means_the_safe_action():
    def read(moment):
        if 20 <= moment.tick < 30:
            raise OSError("unplugged")
        return np.zeros(A + 1) if moment.tick == 40 else None

    _, loop, _ = build(read)
    loop.run(60)
    assert np.flatnonzero(loop.telemetry.rows()["source"] == SAFE).tolist() == [0, *range(20, 30), 40]
    assert loop.events.counts[Event.OPERATOR_ERROR] == 11


def test_a_run_is_recorded_as_sent_with_who_was_in_command(tmp_path):
    def read(moment):
        if moment.tick in (30, 60):
            return Intervention(success=moment.tick == 30)
        if 61 <= moment.tick < 70:
            return Intervention(pause=True)
        return FAR if 10 <= moment.tick < 15 else None

    _, loop, recorder = build(read, record=tmp_path / "run", velocity_limit=5.0)
    loop.run(80)
    path = recorder.close()
    demos = read_demonstrations(path)
    assert demos.masks == {"success": [0], "failure": [1], "unfinished": [2]}
    rows = loop.telemetry.rows()
    first = int(np.flatnonzero(rows["source"] != SAFE)[0])
    # An episode's first command is its first valid one; the tick of a verdict belongs to no episode.
    ticks = [*range(first, 30), *range(31 + 1, 60), *range(71 + 1, 80)]
    assert demos.arrays["tick"].tolist() == ticks
    np.testing.assert_array_equal(demos.arrays["action"], rows["action"][ticks])
    source = demos.arrays["source"]
    assert source[10 - first : 15 - first].tolist() == [command_source.OPERATOR] * 5
    assert (source == command_source.OPERATOR).sum() == 5
    assert loop.events.counts[Event.OPERATOR_PAUSE] == 1
    seen = demos.arrays["observation"][:, 0]
    assert (np.diff(seen) > 0).all()  # the toy robot shows the time
    assert len(list(tmp_path.iterdir())) == 1


def test_episodes_end_with_the_robot_too_and_safe_actions_are_marked(tmp_path):
    robot = ToyRobot(ToyClock(), safe_action="hold")

    def observe(observation):
        tick = round(100 * (robot.clock.now() - 100))
        if 10 <= tick < 50:
            observation["timestamp"] -= 1.0 * (tick >= 20) * (tick < 25)
        return {**observation, EPISODE: tick // 50, SUCCESS: 1.0}

    robot.on_observe = observe
    _, loop, recorder = build(lambda moment: None, robot=robot, record=tmp_path / "run")
    loop.run(120)
    demos = read_demonstrations(recorder.close())
    assert demos.masks == {"success": [0, 1], "unfinished": [2]}
    safe = demos.arrays["source"] == command_source.SAFE
    assert 4 <= safe.sum() <= 6
    assert loop.events.counts[Event.EPISODE_SUCCESS] == 2


def test_a_verdict_resets_a_world_that_can_be_reset():
    robot = ToyRobot(ToyClock(), safe_action="hold")
    world = {"episode": 0, "reset_at": None}

    def end_episode():
        world["reset_at"] = robot.clock.now() + 0.1

    def observe(observation):
        if world["reset_at"] and robot.clock.now() >= world["reset_at"]:
            world.update(episode=world["episode"] + 1, reset_at=None)
        return {**observation, EPISODE: world["episode"]}

    robot.end_episode, robot.on_observe = end_episode, observe
    verdict = lambda m: Intervention(success=True) if m.tick == 20 else None  # noqa: E731
    _, loop, _ = build(verdict, robot=robot, miss_limit=8)  # a reset takes longer, and nobody waits in vain
    loop.run(60)
    assert loop.status.stopped == "finished"
    source = loop.telemetry.rows()["source"]
    assert (source[20:30] == SAFE).all()
    assert (source[35:] != SAFE).all()
    assert loop.events.counts[Event.EPISODE_SUCCESS] == loop.events.counts[Event.EPISODE] == 1


def test_run_control_records_a_run_with_an_operator(tmp_path, monkeypatch):
    config = PolicyConfig(
        {"name": "flow_matching"}, TransformerConfig(width=16, depth=1, num_heads=2), {"observation": (3,)},
        action_dim=A, obs_horizon=2, action_horizon=8, execute_horizon=4,
    )  # fmt: skip
    FlowPolicy(config).save(tmp_path / "policy")
    (tmp_path / "run").mkdir()
    (tmp_path / "my_operators.py").write_text(
        "def helper(moment):\n    return moment.sent if moment.tick % 20 > 9 else None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    settings = {
        "checkpoint": str(tmp_path / "policy"), "backend": "eager", "inference": "thread", "spares": 0,
        "duration_s": 0.4, "operator": "my_operators:helper", "record": str(tmp_path / "kept"),
    }  # fmt: skip
    robot = ToyRobot(MonotonicClock(), safe_action="hold")
    run = run_control(build_settings(RunConfig, settings, ""), tmp_path / "run", robot=robot)
    demos = read_demonstrations(run.recorded)
    assert 0.3 < command_source.commanded_shares(demos.arrays)["operator"] < 0.7
    assert demos.attributes["fps"] == 100
    assert str(run.recorded) in run.table()
    assert "operator" in (tmp_path / "run" / "report.html").read_text()
    assert run.statistics["events"]["take over"] >= 1


class SlowStore:
    """Never finishes a row."""

    def __init__(self):
        self.marks = []

    def append(self, rows):
        time.sleep(0.005)

    def end_episode(self, marks):
        self.marks.append(marks)

    def close(self):
        return None


def test_a_disk_too_slow_costs_an_episode_and_never_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr("flowpolicy.control.recorder.MEMORY_BYTES", 200)
    monkeypatch.setattr("flowpolicy.control.recorder.RecordedStore", lambda *_: SlowStore())
    _, loop, recorder = build(lambda moment: None, record=tmp_path / "run")
    started = time.monotonic()
    loop.run(200)
    assert time.monotonic() - started < 1.0
    recorder.close()
    assert recorder._store.marks == [("unfinished", "incomplete")]
    assert loop.events.counts[Event.RECORDING_LOST] == 1


def moment(tick, sent=(0.0, 0.0)):
    return Moment(tick, {}, None, None if sent is None else np.array(sent, np.float32))


@pytest.fixture
def terminal(monkeypatch):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are not available")
    main, other = pty.openpty()
    with os.fdopen(other, "rb", buffering=0, closefd=True) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield main
    os.close(main)


def test_keys_command_judge_and_pause_and_the_terminal_is_restored(terminal):
    termios = pytest.importorskip("termios")
    before = termios.tcgetattr(sys.stdin.fileno())
    keyboard = build_operator({"kind": "keyboard", "speed": 0.5})
    keyboard.start(ToyRobot(ToyClock(), safe_action="hold").spec, 0.1)
    assert termios.tcgetattr(sys.stdin.fileno()) != before

    def press(keys, tick):
        os.write(terminal, keys.encode())
        return keyboard.read(moment(tick))

    assert keyboard.read(moment(0)) == Intervention()
    np.testing.assert_allclose(press("q", 1).action, [0.1, 0])  # 0.5 a second of a range of 2
    np.testing.assert_allclose(press("s", 3).action, [0, -0.1], atol=1e-7)  # q is released
    np.testing.assert_allclose(press("", 6).action, [0, 0])  # in command until it is given back
    assert press(" ", 7) == Intervention()
    assert press("\n", 8).success is True
    assert press("", 9).pause
    assert press("q", 10).pause  # a letter does not wake the robot up
    assert press("\t", 11) == Intervention()
    assert press("\x7f", 12).success is False
    assert press(" ", 13).action is not None
    keyboard.close()
    keyboard.close()
    assert termios.tcgetattr(sys.stdin.fileno()) == before


def test_a_keyboard_without_a_terminal_is_refused(monkeypatch):
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(ConfigError, match="terminal"):
            build_operator("keyboard").start(ToyRobot(ToyClock()).spec, 0.1)


class Pad:
    """A gamepad as pygame shows one."""

    def __init__(self):
        self.axes, self.buttons = [0.0] * 6, set()

    def __getattr__(self, name):
        answers = {"get_numaxes": 6, "get_numbuttons": 11, "get_name": "pad"}
        return lambda: answers[name]

    def get_axis(self, number):
        return self.axes[number]

    def get_button(self, number):
        return number in self.buttons


def test_a_gamepad_commands_while_its_button_is_held(monkeypatch):
    pad, happened = Pad(), []
    joystick = types.SimpleNamespace(get_count=lambda: 1, Joystick=lambda index: pad)
    fake = types.SimpleNamespace(
        init=lambda: None, quit=lambda: None, joystick=joystick, JOYDEVICEREMOVED=7,
        event=types.SimpleNamespace(get=lambda: happened),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pygame", fake)
    gamepad = build_operator({"kind": "gamepad", "speed": 1.0})
    gamepad.start(ToyRobot(ToyClock(), safe_action="zero").spec, 0.1)  # commanded to velocities
    pad.axes[:2] = [0.55, 1.0]
    assert gamepad.read(moment(0)) == Intervention()
    pad.buttons = {5}
    np.testing.assert_allclose(gamepad.read(moment(1)).action, [0.5, -1])  # axis 1 is inverted
    pad.buttons = {5, 0}
    assert gamepad.read(moment(2)).success is True
    assert gamepad.read(moment(3)).pause  # a held button judges once
    pad.buttons = {7}
    assert gamepad.read(moment(4)) == Intervention()
    happened.append(types.SimpleNamespace(type=7))
    with pytest.raises(OSError, match="disconnected"):
        gamepad.read(moment(5))
    with pytest.raises(ConfigError, match="no number 6"):
        build_operator({"kind": "gamepad", "axes": [6]}).start(ToyRobot(ToyClock()).spec, 0.1)


class Leader:
    """A teleoperator with lerobot's interface and events."""

    action_features = {"b.pos": float, "a.pos": float}  # noqa: RUF012
    is_calibrated = True

    def __init__(self):
        self.is_connected, self.positions, self.events = False, {"a.pos": 10.0, "b.pos": 20.0}, {}
        self.error = None

    def connect(self, calibrate=True):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_teleop_events(self):
        return self.events

    def get_action(self):
        if self.error:
            raise self.error
        return dict(self.positions)


def wait_for(condition):
    until = time.monotonic() + 2
    while not condition() and time.monotonic() < until:
        time.sleep(0.002)
    assert condition()


def test_a_leader_arm_moves_the_robot_from_where_it_stands():
    leader = Leader()
    operator = LeRobotTeleoperator(teleoperator=leader, names=("a.pos", "b.pos"))
    operator.start(ToyRobot(ToyClock(), safe_action="hold").spec, 0.002)
    wait_for(lambda: operator._newest is not None)
    assert operator.read(moment(0)) == Intervention()
    leader.events = {"is_intervention": True}
    wait_for(lambda: operator._switches.commands)
    np.testing.assert_allclose(operator.read(moment(1, (0.5, 0.25))).action, [0.5, 0.25])
    leader.positions["b.pos"] += 0.25
    wait_for(lambda: operator._newest[1][1] > 20.1)
    np.testing.assert_allclose(operator.read(moment(2, (0.5, 0.25))).action, [0.5, 0.5])
    leader.error = OSError("bus")
    wait_for(lambda: operator._error is not None)
    with pytest.raises(OSError, match="bus"):
        operator.read(moment(3))
    operator.close()
    operator.close()
    assert not leader.is_connected


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("keybord", "keyboard"),
        ({"kind": "keyboard", "sped": 1}, "speed"),
        ({"kind": "keyboard", "keys": ["q"]}, "two letters"),
        ("nowhere:function", "cannot be made"),
        ({"kind": "lerobot", "type": "so101_leader"}, "operator"),
    ],
)
def test_operators_that_cannot_be_are_refused(choice, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_operator(choice).start(ToyRobot(ToyClock()).spec, 0.1)


def test_a_device_that_cannot_be_closed_ends_nothing_early(caplog):
    class Gone(FunctionOperator):
        def close(self):
            raise OSError("the cable is out")

    robot = ToyRobot(ToyClock(), safe_action="hold")
    config = ControlConfig(priority=False, wait_share=0.0)
    loop = ControlLoop(
        robot, ToyPolicy(), ToyWorker(1), config, operator=Gone(lambda moment: None), clock=robot.clock
    )
    assert loop.run(20).stopped == "finished"
    assert "the cable is out" in caplog.text


def test_a_rehearsal_is_not_recorded():
    with pytest.raises(ConfigError, match=r"dry_run.*leave out record="):
        RunConfig(checkpoint="x", dry_run=True, record="runs/x")

"""The adapter that the documentation shows is run as it stands there, against an arm that speaks to it."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

import numpy as np
import pytest
from control_toys import ToyPolicy, ToyWorker
from pages import ROOT, Page
from script_runs import run_script

from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.robot import RobotError
from flowpolicy.control.robots.choosing import RobotConfig, build_robot
from flowpolicy.control.run import run_control
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.safety import SafetyConfig
from flowpolicy.control.telemetry import CHUNK, SAFE
from flowpolicy.errors import ConfigError
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig


class Arm:
    """The other end: six joints that go where they are told, and tell where they are every 2 ms."""

    def __init__(self, port):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(0.002)
        self.listener = ("127.0.0.1", port)
        self.position = np.arange(6.0)
        self.commands = []
        self.is_silent = self.ended = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @property
    def address(self):
        return self.socket.getsockname()

    def run(self):
        while not self.ended:
            try:
                packet = self.socket.recv(1024)
                self.position = np.frombuffer(packet)
                self.commands.append(self.position)
            except TimeoutError:
                pass
            if not self.is_silent:
                self.socket.sendto(self.position.tobytes(), self.listener)

    def close(self):
        self.ended = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def code():
    """The example under 'Write an adapter'."""
    return Page.read(ROOT / "docs" / "deploy.md").files["udp_arm.py"]


@pytest.fixture(scope="module")
def adapter(code):
    names = {}
    exec(compile(code, "docs/deploy.md", "exec"), names)
    return names["UdpArm"]


@pytest.fixture
def port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def arm(port):
    arm = Arm(port)
    yield arm
    arm.close()


@pytest.fixture
def robot(adapter, arm, port):
    robot = adapter(port, arm.address)
    yield robot
    robot.close()


def test_it_drives_an_arm_and_stops_when_the_arm_falls_silent(robot, arm):
    def plan(request):  # a tenth of a radian further than the newest position
        return np.tile(request.observation["observation"][-1] + 0.1, (8, 1)).astype(np.float32)

    config = ControlConfig(
        priority=False, wait_share=0.0, safety=SafetyConfig(max_observation_age_s=0.08, miss_limit=1000)
    )
    loop = ControlLoop(robot, ToyPolicy(6, 6), ToyWorker(1, plan), config)

    def silence():
        while loop.status.tick < 60:
            time.sleep(0.002)
        arm.is_silent = True
        until = time.monotonic() + 60.0
        while loop.events.counts[Event.OBSERVATION_STALE] < 20 and time.monotonic() < until:
            time.sleep(0.002)
        loop.stop()

    threading.Thread(target=silence, daemon=True).start()
    loop.run()
    rows = loop.telemetry.rows()
    source, tick, age = rows["source"], rows["tick"], rows["observation_age"]
    # By age and not by tick: on a busy machine the arm falls silent some ticks later than it was told to.
    assert (source[(tick > 10) & (age < 0.05)] == CHUNK).mean() > 0.8
    assert set(source[age > 0.08]) == {SAFE}
    assert loop.events.counts[Event.OBSERVATION_STALE] >= 10
    assert arm.commands[10][0] > 0.1  # it moved, from where it was
    assert max(command.max() for command in arm.commands) <= 3.0  # and never beyond its limits
    np.testing.assert_array_equal(arm.commands[-1], arm.commands[-5])  # it holds


def test_observing_does_not_wait(adapter, port):
    robot = adapter(port, ("127.0.0.1", 9))
    began = time.monotonic()
    with pytest.raises(RobotError, match="nothing yet"):
        robot.observe()
    assert time.monotonic() - began < 0.1
    robot.close()


def test_the_timestamp_is_that_of_the_packet(robot, arm):
    time.sleep(0.05)
    arm.is_silent = True
    time.sleep(0.05)
    first = robot.observe()["timestamp"]
    time.sleep(0.05)
    assert robot.observe()["timestamp"] == first
    assert time.monotonic() - first >= 0.05


def test_a_foreign_packet_is_survived(robot, arm):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.sendto(b"abc", arm.listener)
    time.sleep(0.05)
    before = robot.observe()["timestamp"]
    time.sleep(0.05)
    assert robot.observe()["timestamp"] > before


def test_it_can_be_closed_twice(adapter, port):
    before = threading.active_count()
    robot = adapter(port, ("127.0.0.1", 9))
    robot.close()
    robot.close()
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = PolicyConfig(
        {"name": "flow_matching"}, TransformerConfig(width=16, depth=1, num_heads=2), {"observation": (6,)},
        action_dim=6, obs_horizon=1, action_horizon=8, execute_horizon=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("policy")
    FlowPolicy(config).save(folder)
    return folder


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize("how", ["script", "call"])
def test_one_file_outside_the_package_is_a_robot(
    how, code, adapter, arm, port, checkpoint, tmp_path, repo_root, monkeypatch
):
    run_dir = tmp_path / "run"
    if how == "script":
        pytest.importorskip("hydra", reason="hydra is not installed")
        monkeypatch.setattr("sys.path", [*sys.path])
        (tmp_path / "udp_arm.py").write_text(code)
        host, arm_port = arm.address
        run_script(
            tmp_path, repo_root, "run_control.py", f"checkpoint={checkpoint}", "robot=own",
            "robot.kind=udp_arm:UdpArm", f"robot.options={{port: {port}, arm_address: [{host}, {arm_port}]}}",
            "backend=eager", "inference=thread", "spares=0", "duration_s=0.5", f"run_dir={run_dir}",
        )  # fmt: skip
    else:
        run_dir.mkdir()
        config = RunConfig(
            checkpoint=str(checkpoint), backend="eager", inference="thread", spares=0, duration_s=0.5
        )
        run_control(config, run_dir, robot=adapter(port, arm.address))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["task"], summary["metrics"]["stopped"]) == ("arm", "finished")
    assert summary["metrics"]["sources"]["chunk"] > 0.3
    assert len(arm.commands) > 10
    assert not any(
        thread.name.startswith("Thread") and "_listen" in thread.name for thread in threading.enumerate()
    )
    assert {"report.html", "events.json"} <= {file.name for file in run_dir.iterdir()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "nowhere:Arm"}, "robot.kind=nowhere:Arm cannot be imported"),
        ({"kind": "pathlib:Arm"}, "cannot be imported .* module:Class"),
        ({"kind": "queue:Queue", "options": {"prot": 1}}, "robot.options do not fit Queue"),
        ({"kind": "queue:Queue"}, "lacks spec, observe, act, close"),
        ({"kind": "queue:Queue", "path": "trace"}, "robot.path"),
        ({"kind": "trace", "options": {"port": 1}}, "robot.options"),
        ({"kind": "simulate"}, "did you mean 'simulated'"),
    ],
)
def test_what_is_no_robot_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build_robot(RobotConfig(**settings), None, None, "")

"""Robots by settings: lerobot's config classes, Gymnasium, one's own; observations by the policy's names."""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from control_toys import ToyPolicy

from flowpolicy.control.robot import RobotSpec, innermost
from flowpolicy.control.robots.choosing import GymnasiumConfig, LeRobotConfig, RobotConfig, build_robot
from flowpolicy.control.robots.gymnasium import gymnasium_task
from flowpolicy.control.robots.lerobot_config import lerobot_robot
from flowpolicy.control.robots.renaming import RenamedRobot
from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.features import Image, Vector
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig


class Colour(enum.Enum):
    RGB = "rgb"


class Choices:
    """What lerobot's registries offer."""

    @classmethod
    def get_known_choices(cls):
        return cls.known


class CameraConfig(Choices):
    pass


@dataclass
class WebcamConfig(CameraConfig):
    index_or_path: int | Path
    width: int | None = None
    height: int | None = None
    color_mode: Colour = Colour.RGB


CameraConfig.known = {"opencv": WebcamConfig}


class ArmConfigs(Choices):
    pass


@dataclass
class ArmConfig(ArmConfigs):
    port: str
    id: str | None = None
    calibration_dir: Path | None = None
    cameras: dict[str, CameraConfig] = field(default_factory=dict)
    max_relative_target: float | dict[str, float] | None = None

    def __post_init__(self):
        if any(camera.width is None for camera in self.cameras.values()):
            raise ValueError("Specifying 'width' is required")


ArmConfigs.known = {"toy_follower": ArmConfig}


class ArmOfLeRobot:
    """A robot as lerobot's are, of two joints and the cameras of its config."""

    name = "toy_follower"

    def __init__(self, config):
        self.config, self.sent = config, []
        self.is_connected, self.is_calibrated = False, True
        self.action_features = {"lift.pos": float, "turn.pos": float}
        shapes = {name: (camera.height, camera.width, 3) for name, camera in config.cameras.items()}
        self.observation_features = {**self.action_features, **shapes}

    def connect(self, calibrate=True):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        pictures = {
            name: np.full((camera.height, camera.width, 3), 90, np.uint8)
            for name, camera in self.config.cameras.items()
        }
        return {"lift.pos": 1.0, "turn.pos": 2.0, **pictures}

    def send_action(self, action):
        self.sent.append(action)


@pytest.fixture
def lerobot(monkeypatch):
    """Stands in for the package: its registry and its factory."""
    robots, cameras = types.ModuleType("lerobot.robots"), types.ModuleType("lerobot.cameras")
    robots.RobotConfig, robots.make_robot_from_config, robots.__path__ = ArmConfigs, ArmOfLeRobot, []
    cameras.CameraConfig, cameras.__path__ = CameraConfig, []
    package = types.ModuleType("lerobot")
    package.__path__ = []
    for module in (package, robots, cameras):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def chosen(**settings):
    return RobotConfig.from_settings(settings, "robot")


CAMERA = {"index_or_path": 0, "width": 8, "height": 6, "color_mode": "rgb"}


def with_camera(**changes):
    return {"port": "x", "cameras": {"front": {**CAMERA, **changes}}}


def test_settings_become_configs_of_lerobots_own(lerobot):
    robot = lerobot_robot(
        "toy_follower", {"port": "/dev/x", "calibration_dir": "~/calibration", "cameras": {"front": CAMERA}}
    )
    config = robot.config
    assert isinstance(config.cameras["front"], WebcamConfig)
    assert config.cameras["front"].color_mode is Colour.RGB
    assert config.calibration_dir == Path("~/calibration").expanduser()


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("toy_folower", {}, "did you mean 'toy_follower'"),
        ("", {}, "robot.type is missing; choose one of toy_follower"),
        ("toy_follower", {}, "robot.port is missing"),
        ("toy_follower", {"prot": "x"}, "did you mean 'robot.port'"),
        ("toy_follower", with_camera(indx_or_path=0), "'robot.cameras.front.index_or_path'"),
        ("toy_follower", with_camera(type="web"), "robot.cameras.front.type"),
        ("toy_follower", with_camera(color_mode="hsv"), "color_mode"),
        ("toy_follower", with_camera(width=None), "'width' is required"),
    ],
)
def test_a_wrong_setting_of_lerobots_is_one_sentence(lerobot, kind, settings, words):
    with pytest.raises(ConfigError, match=words) as refused:
        lerobot_robot(kind, settings)
    assert "\n" not in str(refused.value)


def test_lerobots_own_arm_is_made_where_it_is_installed(tmp_path):
    pytest.importorskip("scservo_sdk", reason="lerobot[feetech] is not installed")
    pytest.importorskip("lerobot.robots.so_follower")
    camera = {"index_or_path": 0, "width": 64, "height": 48, "fps": 30, "rotation": 180}
    settings = {"port": "/dev/x", "id": "a", "calibration_dir": str(tmp_path), "cameras": {"front": camera}}
    robot = lerobot_robot("so101_follower", {**settings, "max_relative_target": 5.0})
    assert robot.observation_features["front"] == (48, 64, 3)
    assert list(robot.action_features)[-1] == "gripper.pos"
    assert robot.config.cameras["front"].rotation.name == "ROTATE_180"
    with pytest.raises(ConfigError, match="did you mean 'so101_follower'"):
        lerobot_robot("so101_folower", settings)


def test_without_lerobot_its_package_is_named(monkeypatch):
    for name in ("lerobot", "lerobot.robots"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install 'lerobot"):
        lerobot_robot("so101_follower", {})


@pytest.fixture(scope="module")
def policy():
    """Of an imported LeRobot dataset: cameras are called images.NAME, and are of another size."""
    features = {"observation": Vector((2,)), "images.front": Image((36, 48, 3))}
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    task = {"name": "toy", "control_hz": 50.0}
    policy = FlowPolicy(PolicyConfig({"name": "flow_matching"}, model, features, 2, 1, 8, 4, task=task))
    policy.action_normalizer.center[:] = policy.action_normalizer.scale[:] = 10.0
    return policy


def test_a_robot_of_lerobot_gets_names_sizes_rate_and_limits_from_the_policy(lerobot, policy):
    config = chosen(kind="lerobot", type="toy_follower", port="x", cameras={"front": CAMERA})
    assert isinstance(config, LeRobotConfig)
    robot = build_robot(config, policy, None, "checkpoint")
    robot.spec.check(policy)
    assert robot.spec.rate_hz == 50.0
    assert robot.spec.action_names == ("lift.pos", "turn.pos")
    np.testing.assert_array_equal(robot.spec.action_low, [0, 0])
    np.testing.assert_array_equal(robot.spec.action_high, [20, 20])
    found = robot.observe()
    assert found["images.front"].shape == (36, 48, 3)
    assert (found["images.front"] == 90).all()
    np.testing.assert_array_equal(found["present_pose"], [1, 2])
    assert "timestamp" in found
    robot.act(np.float32([3, 4]))
    assert innermost(robot)._robot.sent == [{"lift.pos": 3.0, "turn.pos": 4.0}]
    robot.close()


@pytest.mark.parametrize(
    ("missing", "words"), [("rate_hz", "robot.rate_hz"), ("action_low", "robot.action_low")]
)
def test_what_neither_policy_nor_user_says_is_asked_for(lerobot, missing, words):
    given = {"rate_hz": 30.0, "action_low": -1.0, "action_high": 1.0} | {missing: None}
    config = LeRobotConfig(type="toy_follower", port="x", **given)
    with pytest.raises(ConfigError, match=words):
        build_robot(config, ToyPolicy(2, 2), None, "")


class Cameras:
    """A robot that sees."""

    def __init__(self, *names):
        shapes = {"observation": (3,), **dict.fromkeys(names, (8, 8, 3))}
        self.spec = RobotSpec("seer", shapes, [-1.0], [1.0], 10.0, "zero")
        self.time = 0.0

    def observe(self):
        return {key: np.zeros(shape, np.uint8) for key, shape in self.spec.observation_shapes.items()} | {
            "timestamp": self.time
        }


WANTED = {"observation": Vector((3,)), "images.top": Image((4, 4, 3))}


def test_names_are_matched_by_their_last_part_or_as_told():
    assert RenamedRobot(Cameras("top"), WANTED).observe()["images.top"].shape == (4, 4, 3)
    robot = RenamedRobot(Cameras("wrist", "left"), WANTED, {"images.top": "left"})
    assert robot.observe()["images.top"].shape == (4, 4, 3)
    assert not RenamedRobot(Cameras("x"), {"observation": Vector((3,))}).changes


def test_an_observation_is_resized_once():
    robot = RenamedRobot(Cameras("top"), WANTED)
    first = robot.observe()
    assert robot.observe() is first
    robot.robot.time = 1.0
    assert robot.observe() is not first


@pytest.mark.parametrize(
    ("names", "told", "error", "words"),
    [
        (("a.top", "b.top"), {}, TaskError, r"several .* a\.top, b\.top; say which"),
        (("top",), {"images.tpo": "top"}, ConfigError, r"did you mean 'images\.top'"),
        (("top",), {"images.top": "tip"}, ConfigError, "did you mean 'top'"),
    ],
)
def test_a_name_that_fits_nothing_or_too_much_is_refused(names, told, error, words):
    with pytest.raises(error, match=words):
        RenamedRobot(Cameras(*names), WANTED, told)


def test_what_is_missing_is_named_with_what_there_is():
    policy = ToyPolicy(observation=(3,), top=(4, 4, 3))
    robot = RenamedRobot(Cameras("wrist"), policy.spec.features)
    with pytest.raises(TaskError, match=r"no observation 'top' .*wrist"):
        policy.spec.check("seer", robot.spec.observation_shapes, (2,))


PENDULUM = "Pendulum-v1"


@pytest.mark.parametrize(
    ("env_id", "safe", "words"),
    [
        ("", "zero", "robot.env_id"),
        (PENDULUM, None, "robot.safe_action"),
        ("No-v0", "zero", "No-v0 cannot be made"),
    ],
)
def test_an_environment_that_does_not_say_enough_is_refused(env_id, safe, words):
    pytest.importorskip("gymnasium")
    with pytest.raises(FlowPolicyError, match=words):
        gymnasium_task(env_id, {}, None, safe, {})


def test_any_environment_is_a_task_once_rate_and_safe_action_are_known():
    pytest.importorskip("gymnasium")
    assert gymnasium_task(PENDULUM, {}, None, "zero", {}).control_hz == 30  # its render_fps
    assert gymnasium_task(PENDULUM, {}, None, None, {"control_hz": 5, "safe_action": "hold"}).control_hz == 5
    assert gymnasium_task(PENDULUM, {}, 10.0, (0.5,), {"control_hz": 5}).safe_action == (0.5,)
    assert isinstance(chosen(kind="gymnasium", env_id=PENDULUM), GymnasiumConfig)
    with pytest.raises(ConfigError, match=r"robot\.env_id"):
        chosen(kind="trace", env_id=PENDULUM)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("robot=my_arm:Arm", ["robot=own", "robot.kind=my_arm:Arm"]),
        ("robot=lab.arms:make_arm", ["robot=own", "robot.kind=lab.arms:make_arm"]),
        ("robot=trace", ["robot=trace"]),
        ("env=a:B", ["env=a:B"]),
    ],
)
def test_an_own_robot_is_named_in_one_word(word, words):
    pytest.importorskip("hydra")
    from flowpolicy.overrides import own_robot

    assert own_robot(word) == words


def test_the_documented_command_composes():
    hydra = pytest.importorskip("hydra")
    words = [
        "robot=lerobot", "robot.type=so101_follower", "robot.port=/dev/ttyACM0", "robot.id=arm",
        "robot.cameras={front: {index_or_path: 0, width: 640, height: 480, fps: 30}}", "dry_run=true",
    ]  # fmt: skip
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"):
        found = hydra.compose("run_control", overrides=words).robot
    config = chosen(**dict(found) | {"cameras": dict(found.cameras)})
    assert config.type == "so101_follower"
    assert config.cameras["front"]["fps"] == 30

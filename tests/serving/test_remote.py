"""The control loop as a client of a policy server: of ours, and of one that does not describe its policy."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import numpy as np
import pytest

pytest.importorskip("websockets", reason="websockets is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")

from served_policy import TOKEN, make_policy, observation, serving
from websockets.sync.server import serve

from flowpolicy.control.config import ControlConfig
from flowpolicy.control.inference import build_worker
from flowpolicy.control.inference_hosts import Request
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.robot import RobotSpec
from flowpolicy.control.run import run_control
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.served import PolicyServer
from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.features import Vector
from flowpolicy.features.text import text_kind
from flowpolicy.serving.messages import decode, encode
from flowpolicy.serving.remote import RemoteInference, RemotePolicy
from flowpolicy.spec import PolicySpec


class Arm:
    """Goes where it is told."""

    def __init__(self, **shapes):
        shapes = shapes or {"observation": (3,), "goal": (2,)}
        low = np.full(2, -1, np.float32)
        self.spec = RobotSpec("arm", shapes, low, -low, 50.0, "hold")
        self.commands, self.looks = [], 0

    def observe(self):
        shapes = self.spec.observation_shapes
        self.looks += 1
        found = {
            key: np.full(shape, self.looks % 256, np.uint8 if len(shape) == 3 else np.float32)
            for key, shape in shapes.items()
        }
        return found | {"timestamp": time.monotonic()}

    def act(self, action):
        self.commands.append(np.array(action))

    def close(self):
        pass


@contextlib.contextmanager
def foreign(answer, metadata=None):
    """A server as openpi's: metadata that say nothing of the policy, then an answer to each request."""

    def handle(connection):
        connection.send(encode(metadata or {}))
        for message in connection:
            connection.send(answer(decode(message)))

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def control(url, folder, robot, **settings):
    config = RunConfig(
        policy_server=PolicyServer(url, **settings), inference="thread", spares=0, duration_s=0.6,
        control=ControlConfig(priority=False),
    )  # fmt: skip
    return run_control(config, folder, robot=robot, connect=RemotePolicy)


def test_our_server_says_what_its_policy_observes_and_drives_the_robot(tmp_path):
    policy = make_policy()
    with serving(policy) as server:
        host, port = server.address
        remote = RemotePolicy(PolicyServer(f"ws://{host}:{port}"))
        assert remote.policy.spec.features == policy.spec.features
        seen = observation()
        inference = remote.builder()()
        assert inference(Request(0, seen)).shape == policy.spec.chunk_shape
        inference.close()
        remote.close()
        arm = Arm()
        run = control(f"ws://{host}:{port}", tmp_path, arm)
    assert run.stopped == "finished"
    assert run.statistics["sources"]["chunk"] > 0.3
    assert len(arm.commands) > 5
    assert json.loads((tmp_path / "summary.json").read_text())["about"]["policy_server"].endswith(str(port))


def test_a_server_that_describes_nothing_is_asked_by_its_own_names():
    requests = []

    def answer(request):
        requests.append(request)
        return encode({"actions": np.full((6, 2), 0.5), "server_timing": {}})

    arm = Arm(joints=(3,), front=(4, 4, 3))
    names = {"state": "joints", "images": {"cam_high": "front"}}
    with foreign(answer, {"reset_pose": [0.0]}) as url:
        remote = RemotePolicy(PolicyServer(url, observations=names, prompt="lift the cup"))
        assert remote.policy is None
        policy = remote.adopt(arm)
        assert (policy.spec.chunk_shape, policy.spec.execute_horizon) == ((6, 2), 3)
        worker = build_worker("thread", remote.builder(), spares=0)
        status = ControlLoop(arm, policy, worker, ControlConfig(priority=False)).run(20)
        worker.close()
        remote.close()
    assert (status.stopped, status.chunks > 1) == ("finished", True)
    assert requests[-1]["prompt"] == "lift the cup"
    assert requests[-1]["state"].shape == (3,)
    assert requests[-1]["images"]["cam_high"].shape == (4, 4, 3)
    np.testing.assert_array_equal(arm.commands[-1], [0.5, 0.5])


def fitting(request):
    return encode({"actions": np.zeros((6, 2))})


@pytest.mark.parametrize(
    ("answer", "settings", "error", "words"),
    [
        (lambda r: encode({"actions": np.zeros((6, 7))}), {}, TaskError, r"\(6, 7\); arm takes .* 2 numbers"),
        (lambda r: encode({"noise": 0}), {}, TaskError, "answers with actions of shape"),
        (fitting, {"execute_horizon": 9}, ConfigError, "at most 6"),
        (fitting, {"observations": {"state": "x"}}, ConfigError, "is 'x'; the robot observes"),
        (lambda r: "Traceback (most recent):\n  x\nKeyError: y", {}, FlowPolicyError, "refuses: KeyError: y"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_fit_is_refused_before_anything_moves(
    tmp_path, answer, settings, error, words
):
    arm = Arm()
    with foreign(answer) as url, pytest.raises(error, match=words):
        control(url, tmp_path, arm, **settings)
    assert arm.commands == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ws://", "ws://host:port", "ws://127.0.0.1:1/policy"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="policy_server"):
        RemotePolicy(PolicyServer(url))


def test_a_token_is_shown(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    with serving(make_policy(), token=TOKEN) as server:
        host, port = server.address
        monkeypatch.delenv("FLOWPOLICY_TOKEN", raising=False)
        with pytest.raises(ConfigError, match="refuses"):
            RemotePolicy(PolicyServer(f"ws://{host}:{port}"))
        RemotePolicy(PolicyServer(f"ws://{host}:{port}", token_file=str(file))).close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "'checkpoint' needs a value"),
        ({"checkpoint": "x", "policy_server": "ws://x"}, "leave out one"),
        ({"policy_server": "ws://x", "num_steps": 4}, "leave out num_steps"),
        ({"policy_server": "ws://x", "control": ControlConfig(fusion="rtc")}, r"control\.fusion=rtc"),
    ],
)
def test_settings_of_a_checkpoint_do_not_go_with_a_server(settings, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig(**settings)


def test_a_prompt_takes_the_place_of_the_robots_words():
    class Client:
        spec = PolicySpec({"state": Vector((3,)), "task": text_kind("text", ["lift"], "task")}, 1, 4, 2, 2)
        is_described = True

        def infer(self, observation):
            self.asked = observation
            return {"actions": np.zeros((4, 2))}

    client = Client()
    request = Request(0, {"state": np.zeros((1, 3)), "task": np.zeros((1, 64), np.int32)})
    RemoteInference(client, PolicyServer("ws://x:1", prompt="lift the cup"))(request)
    assert sorted(client.asked) == ["prompt", "state"]
    RemoteInference(client, PolicyServer("ws://x:1"))(request)
    assert sorted(client.asked) == ["state", "task"]

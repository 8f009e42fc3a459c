"""What the policy server answers, to openpi's client and to ours, and where it listens."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
import torch
import websockets
from served_policy import (
    KEYS,
    TOKEN,
    Changed,
    make_policy,
    noise,
    observation,
    raw,
    serving,
    until_closed,
)
from websockets.sync.client import connect

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.serving.client import PolicyClient
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.messages import decode, encode
from flowpolicy.serving.server import PolicyServer
from flowpolicy.serving.service import PolicyService


@pytest.mark.parametrize("batch", [(), (1,), (5,)])
def test_openpis_client_gets_the_actions_of_the_policy(server, sampler, monkeypatch, batch):
    theirs = pytest.importorskip("openpi_client.websocket_client_policy", reason="no openpi-client")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    client = theirs.WebsocketClientPolicy(*server.address, api_key=TOKEN)
    metadata = client.get_server_metadata()
    assert metadata["observation_shapes"] == {"observation": [3], "goal": [2]}
    assert (metadata["obs_horizon"], metadata["action_horizon"], metadata["action_dim"]) == (2, 4, 2)
    given, x0 = observation(*batch), noise(*batch)
    answer = client.infer({**given, "noise": x0})
    rows = {key: value.reshape(-1, *value.shape[-2:]) for key, value in given.items()}
    wanted = sampler.act(rows, noise=torch.from_numpy(x0.reshape(-1, 4, 2))).numpy().reshape(*batch, 4, 2)
    assert answer["actions"].dtype == np.float32
    np.testing.assert_array_equal(answer["actions"], wanted)
    assert 0 < answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
    with pytest.raises(RuntimeError, match="lacks 'goal'"):
        client.infer({"observation": given["observation"]})
    assert client.infer(given)["actions"].shape == (*batch, 4, 2)


def test_openpis_client_is_refused_without_the_token(server, monkeypatch):
    theirs = pytest.importorskip("openpi_client.websocket_client_policy", reason="no openpi-client")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for key in (None, "wrong-token"):
        with pytest.raises(websockets.exceptions.InvalidStatus, match="401"):
            theirs.WebsocketClientPolicy(*server.address, api_key=key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"goal": None}, "no array"),
        ({"extra": np.zeros(3)}, "unknown entry 'extra'"),
        ({"goal": np.zeros(2)}, r"shape \(2,\); send \(2, 2\)"),
        ({"goal": np.zeros((3, 2))}, "shape"),
        ({"goal": np.zeros((2, 2, 2))}, "different batch sizes"),
        ({"goal": np.full((2, 2), np.nan)}, "'goal' holds NaN"),
        ({"goal": np.full((2, 2), 1e300)}, "'goal' holds NaN or infinity"),
        ({"noise": np.full((4, 2), np.inf, np.float32)}, "noise holds NaN"),
        ({"noise": np.zeros((3, 2))}, "noise has shape"),
        ({"noise": np.zeros((2, 4, 2))}, "noise and the observations have different batch"),
        ({key: np.zeros((0, 2, *shape)) for key, shape in KEYS.items()}, "0 observations"),
        ({key: np.zeros((9, 2, *shape)) for key, shape in KEYS.items()}, "1 to 8"),
    ],
)
def test_a_bad_request_is_one_sentence_and_the_connection_stays(client, change, words):
    with pytest.raises(FlowPolicyError, match=words) as refused:
        client.infer(observation() | change)
    assert "\n" not in str(refused.value)
    assert client.infer(observation())["actions"].shape == (4, 2)


@pytest.mark.parametrize("message", ["text", b"", b"\xc1", b"\x91" * 5000, msgpack.packb([1]), b"\xff" * 999])
def test_garbage_is_answered_with_a_sentence(server, monkeypatch, message):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    headers = {"Authorization": f"Api-Key {TOKEN}"}
    host, port = server.address
    with connect(f"ws://{host}:{port}", additional_headers=headers, compression=None) as client:
        client.recv()
        client.send(message)
        answer = client.recv()
        assert isinstance(answer, str)
        assert "message" in answer or "request" in answer
        client.send(encode(observation()))
        assert decode(client.recv())["actions"].shape == (4, 2)


def test_one_step_of_history_may_be_left_out():
    policy = make_policy(obs_horizon=1)
    x0 = noise()
    with serving(policy) as server, PolicyClient(*server.address) as client:
        full = observation(obs_horizon=1)
        short = {key: value[0] for key, value in full.items()}
        wanted = client.infer({**full, "noise": x0})["actions"]
        np.testing.assert_array_equal(client.infer({**short, "noise": x0})["actions"], wanted)


def test_an_answer_with_nan_is_not_sent(sampler):
    policy = make_policy()
    with serving(policy) as server, PolicyClient(*server.address) as client:
        with torch.no_grad():
            next(policy.network.parameters()).fill_(torch.nan)
        with pytest.raises(FlowPolicyError, match="policy answered with NaN"):
            client.infer(observation())


def test_an_exception_of_the_policy_reaches_the_client_and_ends_nothing(sampler):
    raises = []

    def moody():
        if raises:
            raise RuntimeError("secret details")

    with serving(Changed(sampler, moody)) as server, PolicyClient(*server.address) as client:
        raises.append(1)
        with pytest.raises(FlowPolicyError, match="RuntimeError") as told:
            client.infer(observation())
        assert "secret" not in str(told.value)
        raises.clear()
        assert client.infer(observation())["actions"].shape == (4, 2)
        assert server.statistics.failures["policy error"] == 1


def test_health_needs_no_token_and_a_plain_request_gets_none_of_the_policy(server):
    healthy = until_closed(raw(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert healthy.startswith(b"HTTP/1.1 200")
    assert healthy.endswith(b"OK\n")
    assert until_closed(raw(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_an_open_address_needs_a_token(sampler, host):
    with pytest.raises(ConfigError, match="allow_anonymous"):
        PolicyServer(PolicyService(sampler), ServerConfig(host=host, port=0))


def test_an_open_address_with_a_token_or_on_request(sampler):
    for settings in ({"token": TOKEN}, {"allow_anonymous": True}):
        PolicyServer(
            PolicyService(sampler), ServerConfig(host="0.0.0.0", port=0, **settings)
        )._listener.close()


def test_a_taken_port_is_one_sentence(sampler, server):
    with pytest.raises(ConfigError, match="another program has it"):
        PolicyServer(PolicyService(sampler), ServerConfig(port=server.address[1]))


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch, caplog):
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    file.chmod(0o600)
    monkeypatch.setenv("FLOWPOLICY_TOKEN", "from-the-environment")
    assert ServerConfig().secret() == "from-the-environment"
    assert ServerConfig(token="on-the-command-line").secret() == "on-the-command-line"
    assert ServerConfig(token_file=str(file)).secret() == "from-a-file"
    assert not caplog.records
    file.chmod(0o644)
    ServerConfig(token_file=str(file)).secret()
    assert "chmod 600" in caplog.text
    assert "from-a-file" not in caplog.text + repr(ServerConfig(token="from-a-file"))
    with pytest.raises(ConfigError, match="leave out token"):
        ServerConfig(token="on-the-command-line", token_file=str(file)).secret()
    for bad in ("short", "with a space", "línea-larga", ""):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="unusable"):
            ServerConfig(token_file=str(file)).secret()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerConfig(token_file=str(tmp_path / "none")).secret()

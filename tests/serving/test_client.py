"""The client of a policy server, in place of a policy and when its server fails."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from served_policy import frame, make_policy, noise, observation, serving
from websockets.utils import accept_key

from flowpolicy.errors import ConfigError
from flowpolicy.execution.receding_horizon import RecedingHorizon
from flowpolicy.serving.client import PolicyClient, ServerUnreachableError
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.messages import encode
from flowpolicy.serving.server import PolicyServer
from flowpolicy.serving.service import PolicyService


def test_a_client_acts_as_the_policy_does(client, sampler):
    given, x0 = observation(3), torch.from_numpy(noise(3))
    assert client.spec == sampler.spec
    assert client.device == sampler.device
    assert client.nfe() == sampler.nfe() == 4
    torch.testing.assert_close(client.act(given, noise=x0), sampler.act(given, noise=x0), rtol=0, atol=0)
    seeded = [policy.act(given, generator=torch.Generator().manual_seed(5)) for policy in (client, sampler)]
    torch.testing.assert_close(*seeded, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="num_steps=4, not 2"):
        client.act(given, num_steps=2)


def test_execution_takes_a_client_in_place_of_its_policy(client, sampler):
    def actions(policy):
        execution = RecedingHorizon(policy, 2, policy.spec.execute_horizon)
        execution.reset(0, 3)
        execution.reset(1, 4)
        steps = [observation(obs_horizon=2, seed=seed) for seed in range(5)]
        return np.stack([execution.actions(step, [0, 1]) for step in steps])

    np.testing.assert_array_equal(actions(client), actions(sampler))


def test_a_killed_server_is_one_error_and_its_successor_is_found(sampler):
    with serving(sampler) as first:
        host, port = first.address
        client = PolicyClient(host, port, connect_timeout=5.0)
        client.infer(observation())
    with pytest.raises(ServerUnreachableError, match="next request connects again"):
        client.infer(observation())

    def start_later():
        time.sleep(0.3)
        server = PolicyServer(PolicyService(sampler), ServerConfig(port=port))
        servers.append(server)
        with server.running():
            done.wait(10)

    servers, done = [], threading.Event()
    thread = threading.Thread(target=start_later)
    thread.start()
    assert client.infer(observation())["actions"].shape == (4, 2)
    client.close()
    done.set()
    thread.join()


def test_another_policy_at_the_same_address_is_refused(sampler):
    with serving(sampler) as first:
        client = PolicyClient(*first.address, connect_timeout=1.0)
    port = first.address[1]
    with pytest.raises(ServerUnreachableError):
        client.infer(observation())
    other = PolicyServer(PolicyService(make_policy(obs_horizon=1)), ServerConfig(port=port))
    with other.running(), pytest.raises(ServerUnreachableError, match="another obs_horizon"):
        client.infer(observation())


def test_no_server_and_a_wrong_token_are_different_sentences(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerUnreachableError, match="start one with"):
        PolicyClient("127.0.0.1", port, connect_timeout=0.2)
    with pytest.raises(ConfigError, match="right token"):
        PolicyClient(*server.address, "wrong-token")


@contextmanager
def dumb_server(talk):
    """A websocket server of a few bytes, for answers that ours never gives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=greet, args=(connection,), daemon=True).start()

        def greet(connection):
            request = connection.recv(4096).decode()
            key = next(line.split(": ")[1] for line in request.split("\r\n") if "-Key" in line)
            accepted = accept_key(key)
            connection.sendall(
                f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Accept: {accepted}\r\n\r\n".encode()
            )
            talk(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("size", [2, 3_000_000])
def test_a_server_that_stalls_is_an_error_in_time(sampler, size):
    metadata = PolicyService(sampler).metadata
    with dumb_server(lambda peer: (peer.sendall(frame(encode(metadata))), time.sleep(3))) as port:
        client = PolicyClient(port=port, timeout=0.3)
        started = time.monotonic()
        with pytest.raises(ServerUnreachableError):
            client.infer({"observation": np.zeros(size)})
        assert time.monotonic() - started < 2
        client.close()


def test_a_server_of_another_kind_is_refused():
    def greet(peer):
        peer.sendall(frame(encode({"hello": 1})))

    with dumb_server(greet) as port, pytest.raises(ServerUnreachableError, match="none of flowpolicy's"):
        PolicyClient(port=port)


@pytest.mark.parametrize(
    ("observations", "words"),
    [
        ({"observation": {"kind": "vector", "shape": [-3]}}, "another shape"),
        ({"goal": {"kind": "vector", "shape": [3]}}, "another shape"),
        ({"observation": {"kind": "smell", "shape": [3]}}, "smell"),
        ({"observation": {"kind": "vector"}}, "shape"),
        ({"observation": {"kind": "task", "shape": [3]}}, "another observations"),
    ],
)
def test_what_a_server_says_after_a_reconnection_is_checked_before_it_is_kept(observations, words):
    told = {"observation_shapes": {"observation": [3]}, "obs_horizon": 1, "action_horizon": 4,
            "execute_horizon": 2, "action_dim": 2, "nfe": 4}  # fmt: skip
    greetings = [told, {**told, "observations": observations}, told]
    with dumb_server(lambda peer: peer.sendall(frame(encode(greetings.pop(0))))) as port:
        client = PolicyClient(port=port, timeout=0.2, connect_timeout=1.0)
        spec, metadata = client.spec, client.metadata
        client.close()
        with pytest.raises(ServerUnreachableError, match=words):
            client.infer(np.zeros(3))
        assert (client.spec, client.metadata) == (spec, metadata)
        with pytest.raises(ServerUnreachableError, match=r"gave no answer|ended the connection"):
            client.infer(np.zeros(3))  # it connects again

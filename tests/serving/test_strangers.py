"""Messages of openpi's example clients and of msgpack-numpy, and servers that are none of ours."""

from __future__ import annotations

import contextlib
import logging
import pickle
import socket
import threading
import time

import msgpack
import numpy as np
import pytest
import torch
from served_policy import TOKEN, frame, handshake, observation, raw, serving, until_closed

from flowpolicy.errors import FlowPolicyError
from flowpolicy.features import features_of
from flowpolicy.serving.client import PolicyClient, ServerUnreachableError
from flowpolicy.serving.messages import MessageError, decode, encode
from flowpolicy.serving.service import PolicyService
from flowpolicy.spec import PolicySpec

ALOHA = {
    "state": np.ones(14),
    "images": {"cam_high": np.arange(3 * 8 * 6).reshape(3, 8, 6).astype(np.uint8)},
    "prompt": "do something",
}
LIBERO = {
    "observation/state": np.ones(14),
    "observation/cam_high": np.zeros((8, 6, 3), np.uint8),
    "prompt": "do something",
}


class Observer:
    """A policy of T_o = 1 that keeps what it was given."""

    def __init__(self, **shapes):
        self.spec = PolicySpec(features_of(shapes), 1, 4, 4, action_dim=2)

    def nfe(self):
        return 1

    def act(self, observations, noise):
        self.seen = observations
        return torch.zeros(noise.shape)


def ask(policy, message):
    return list(PolicyService(policy).answer(encode(message)))[-1]


@pytest.mark.parametrize("message", [ALOHA, LIBERO], ids=["aloha", "libero"])
@pytest.mark.parametrize("prefix", ["", "images/"])
def test_what_openpis_example_clients_send_is_understood(message, prefix, caplog):
    policy = Observer(state=(14,), **{f"{prefix}cam_high": (8, 6, 3)})
    if prefix and message is LIBERO:
        with pytest.raises(FlowPolicyError, match=r"'observation/cam_high'.*takes state, images/cam_high"):
            ask(policy, message)
        return
    with caplog.at_level(logging.INFO):
        ask(policy, message)
    assert policy.seen[f"{prefix}cam_high"].shape == (1, 1, 8, 6, 3)
    if message is ALOHA:
        wanted = np.moveaxis(ALOHA["images"]["cam_high"], 0, -1)
        np.testing.assert_array_equal(policy.seen[f"{prefix}cam_high"][0, 0], wanted)
    assert "'prompt'" in caplog.text


def test_a_prompt_is_mentioned_once(caplog):
    service = PolicyService(Observer(state=(2,)))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            list(service.answer(encode({"state": np.zeros(2), "prompt": "lift"})))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"state": np.zeros(2), "prompt": 3}, "'prompt' is no text"),
        ({"state": np.zeros(2), "observation/state": np.zeros(2)}, "both mean 'state'"),
        ({"state": np.zeros(2), "images": {"left": np.zeros(2)}}, "unknown entry 'images/left'"),
        ({"state": {}}, "lacks 'state'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(message, words):
    with pytest.raises(FlowPolicyError, match=words):
        ask(Observer(state=(2,)), message)


def test_a_policy_that_reads_prompt_gets_it():
    policy = Observer(prompt=(2,))
    ask(policy, {"prompt": np.ones(2)})
    assert policy.seen["prompt"].sum() == 2


def theirs(value, text=False, **changes):
    """As msgpack-numpy writes an array or scalar."""
    is_array = isinstance(value, np.ndarray)
    parts = {"nd": is_array, "type": value.dtype.str, "data": value.tobytes()}
    if is_array:
        parts |= {"kind": b"", "shape": list(value.shape)}
    return {key if text else key.encode(): part for key, part in (parts | changes).items()}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("value", [np.arange(6.0).reshape(2, 3), np.zeros((0, 3), "i2"), np.float32(1.5)])
def test_the_layout_of_msgpack_numpy_is_read(value, text):
    found = decode(msgpack.packb({"x": theirs(value, text)}))["x"]
    np.testing.assert_array_equal(found, value)
    assert found.dtype == value.dtype


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": b"O", "type": "|O", "data": pickle.dumps([1])}, "objects or structures"),
        ({"type": "|O"}, "dtype"),
        ({"type": 7}, "dtype"),
        ({"data": b"123"}, "3 bytes"),
        ({"data": 3}, "lacks its data"),
        ({"shape": "ab"}, "list of sizes"),
        ({"more": 1}, "msgpack-numpy"),
    ],
)
def test_of_msgpack_numpy_only_numbers_are_read(changes, words):
    with pytest.raises(MessageError, match=words):
        decode(msgpack.packb({"x": theirs(np.zeros(2), **changes)}))


@contextlib.contextmanager
def speaking(first, then=b"", pause=0.0):
    """A server that says ``first`` unasked and ``then`` to whatever it hears."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk(connection):
            with contextlib.suppress(OSError), connection:
                connection.sendall(first)
                connection.recv(4096)
                connection.sendall(then)
                time.sleep(pause)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


SERVERS = {
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", b""),
    "smtp": (b"220 mail.example.com ESMTP\r\n", b"500 what?\r\n"),
    "mysql": (b"J\0\0\0\n8.0.36\0" + bytes(60), b""),
    "redis": (b"", b"-ERR wrong number of arguments\r\n"),
    "tls": (b"", b"\x15\x03\x01\x00\x02\x02\x46"),
    "web": (b"", b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno\n"),
    "old web": (b"", b"HTTP/1.0 200 OK\r\n\r\n<html>"),
    "moved": (b"", b"HTTP/1.1 301 Moved Permanently\r\nLocation: https://a.b/\r\nContent-Length: 0\r\n\r\n"),
    "wrong key": (
        b"",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: AAAA\r\n\r\n",
    ),
}


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_another_kind_of_server_is_one_sentence(kind, pause):
    with speaking(*SERVERS[kind], pause) as port:
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(ServerUnreachableError) as refused:
                PolicyClient(port=port, connect_timeout=0.4)
            assert time.monotonic() - started < 2
            assert str(port) in str(refused.value)
            assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200"], ids=["silence", "half an answer"])
def test_a_server_that_does_not_answer_is_one_sentence(first):
    with speaking(b"", first, 3.0) as port, pytest.raises(ServerUnreachableError, match=r"within 0\.3 s"):
        PolicyClient(port=port, connect_timeout=0.3)


def test_a_flood_of_fragments_or_pings_ends_the_connection_early(sampler):
    fragments = frame(b"a", mask=True, fin=False) + 30_000 * frame(b"a", 0, True, False)
    pings = 30_000 * frame(b"", 9, True)
    with serving(sampler, token=TOKEN) as server:
        for data in (fragments, pings):
            started = time.process_time()
            with contextlib.suppress(OSError):
                until_closed(raw(server, handshake() + data), 5)
            assert time.process_time() - started < 0.25
        assert server.statistics.failures["too many fragments or pings"] == 2


def test_a_large_message_may_come_in_pieces(sampler):
    message = encode(observation(64))
    pieces = [message[start : start + 16] for start in range(0, len(message), 16)][:200]
    rest = message[200 * 16 :]
    data = frame(pieces[0], 2, True, False) + b"".join(frame(piece, 0, True, False) for piece in pieces[1:])
    with serving(sampler) as server:
        connection = raw(server, handshake() + data + frame(rest, 0, True))
        ends = time.monotonic() + 5
        while not server.statistics.answered and time.monotonic() < ends:
            time.sleep(0.01)
        assert server.statistics.answered == 1
        connection.close()

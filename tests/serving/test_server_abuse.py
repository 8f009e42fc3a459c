"""Clients that do not mean well, and what others notice of them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import numpy as np
import pytest
from served_policy import (
    TOKEN,
    Changed,
    frame,
    handshake,
    observation,
    raw,
    serving,
    until_closed,
)
from websockets.datastructures import Headers
from websockets.http11 import Request

from flowpolicy.serving.client import PolicyClient, ServerUnreachableError
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.connections import Admission, GuardedConnection, ServerStatistics
from flowpolicy.serving.messages import encode

HOSTILE = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 20,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "half a handshake": handshake()[:60],
    "huge header": handshake(extra="X-Long: " + "a" * 100_000 + "\r\n"),
    "many headers": handshake(extra="".join(f"X-{i}: a\r\n" for i in range(1000))),
    "wrong token": handshake("wrong-token"),
    "two tokens": handshake(extra=f"Authorization: Api-Key {TOKEN}\r\n"),
    "a web page": handshake(extra="Origin: https://example.com\r\n"),
    "no websocket": f"GET / HTTP/1.1\r\nAuthorization: Api-Key {TOKEN}\r\n\r\n".encode(),
    "unmasked": handshake() + frame(b"x"),
    "reserved bits": handshake() + b"\xf2\x80\0\0\0\0",
    "half a message": handshake() + frame(b"abc", mask=True, claim=1000),
    "too large": handshake() + frame(b"", mask=True, claim=2**40),
    "endless fragments": handshake() + frame(b"a", mask=True, fin=False) + 50 * frame(b"a", 0, True, False),
    "broken text": handshake() + frame(b"\xff\xfe", opcode=1, mask=True),
    "malformed messages": handshake() + 20 * frame(b"\xc1", mask=True),
    "array of objects": handshake() + frame(b"\x81\xc4\x01a\xc4\x01b", mask=True) + frame(b"", 8, True),
}


@pytest.fixture(scope="module")
def impatient(sampler):
    limits = {"handshake_timeout_s": 0.3, "message_timeout_s": 0.3, "write_timeout_s": 0.3}
    with serving(sampler, token=TOKEN, **limits) as server:
        yield server


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_client_is_closed_and_others_are_served(impatient, kind):
    with PolicyClient(*impatient.address, TOKEN) as good:
        started = time.monotonic()
        hostile = [raw(impatient, HOSTILE[kind]) for _ in range(4)]
        assert good.infer(observation())["actions"].shape == (4, 2)
        for connection in hostile:
            until_closed(connection)
        assert time.monotonic() - started < 6
        assert good.infer(observation())["actions"].shape == (4, 2)
    assert until_closed(raw(impatient, b"GET /healthz HTTP/1.1\r\n\r\n")).endswith(b"OK\n")


def test_one_byte_now_and_then_does_not_keep_a_place(impatient):
    connection = raw(impatient, handshake() + frame(b"", mask=True, claim=1000))
    started = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - started < 5:
            connection.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - started < 2
    connection.close()
    assert impatient.statistics.failures["message not finished in time"] > 0


def test_a_client_that_takes_no_answers_is_dropped(impatient, monkeypatch):
    monkeypatch.setattr("flowpolicy.serving.server.PAUSE_AFTER_ERROR_S", 0.0)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(impatient.address)
    bad = frame(encode(1), mask=True)
    connection.sendall(handshake())
    before = impatient.statistics.failures["client does not read"]
    connection.settimeout(0.2)
    ends = time.monotonic() + 20
    while impatient.statistics.failures["client does not read"] == before and time.monotonic() < ends:
        try:
            connection.send(bad * 200)
        except TimeoutError:
            continue
        except OSError:
            break
    connection.close()
    assert impatient.statistics.failures["client does not read"] == before + 1


def test_a_flooding_client_waits_for_its_turn_like_others(sampler):
    with serving(Changed(sampler, lambda: time.sleep(0.01)), max_batch=64) as server:
        flood = raw(server, handshake() + 300 * frame(encode(observation()), mask=True))
        batch = raw(server, handshake() + 20 * frame(encode(observation(64)), mask=True))
        with PolicyClient(*server.address) as good:
            seconds = []
            for _ in range(10):
                started = time.perf_counter()
                good.infer(observation())
                seconds.append(time.perf_counter() - started)
        # Its own 10 ms behind one chunk of each other; in the order of arrival the first would wait for 3 s.
        assert np.median(seconds) < 0.1
        assert max(seconds) < 1.5
        flood.close()
        batch.close()


def test_handshakes_that_lead_nowhere_leave_room_for_one_that_does(sampler, monkeypatch):
    monkeypatch.setattr("flowpolicy.serving.connections.MAX_HANDSHAKES", 8)
    with serving(sampler) as server:
        silent = [raw(server, b"GET /") for _ in range(30)]
        with PolicyClient(*server.address, connect_timeout=2) as good:
            assert good.infer(observation())["actions"].shape == (4, 2)
        assert server.statistics.failures["too many handshakes at once"] >= 20
        for connection in silent:
            connection.close()


def test_a_full_server_refuses_until_one_of_its_clients_has_been_silent(sampler, monkeypatch):
    with serving(sampler, max_connections=2) as server:
        first = PolicyClient(*server.address)
        second = PolicyClient(*server.address)
        for each in (second, first):
            each.infer(observation())
        with pytest.raises(ServerUnreachableError, match="503"):
            PolicyClient(*server.address, connect_timeout=0.2)
        monkeypatch.setattr("flowpolicy.serving.connections.SPARE_AFTER_S", 0.5)
        time.sleep(0.6)
        second.infer(observation())
        with PolicyClient(*server.address, connect_timeout=2) as third:
            assert third.infer(observation())["actions"].shape == (4, 2)
            assert second.infer(observation())["actions"].shape == (4, 2)
            with pytest.raises(ServerUnreachableError):  # the one that was silent the longest
                first.infer(observation())
        second.close()


def test_connections_that_break_at_once_do_not_keep_their_places(sampler):
    with serving(sampler, max_connections=2) as server:
        for _ in range(100):
            connection = raw(server, handshake())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
            connection.close()
        with PolicyClient(*server.address, connect_timeout=2) as good:
            assert good.infer(observation())["actions"].shape == (4, 2)


def test_one_that_broke_before_it_was_let_in_is_not():
    class Connection(GuardedConnection):
        def __init__(self):
            self.is_counted = self.is_served = False
            self.peer = "127.0.0.1"
            self.host = admission

        def respond(self, status, text):
            return status

    admission = Admission(ServerConfig(), ServerStatistics())
    connection = Connection()
    admission.arrived(connection)
    admission.left(connection)
    assert admission.admit(connection, Request("/", Headers())) == 503
    assert not admission.clients
    assert not admission.handshakes


def test_an_idle_client_is_closed(sampler):
    with serving(sampler, idle_timeout_s=0.2) as server:
        silent = raw(server, handshake())
        assert b"idle" in until_closed(silent, 3)
        assert server.statistics.failures == {"idle": 1}


def test_stopping_answers_what_is_under_way(sampler):
    busy, delay, answers = threading.Event(), [0.0], []

    def slow():
        busy.set()
        time.sleep(delay[0])

    with serving(Changed(sampler, slow)) as server:
        client, idle = PolicyClient(*server.address), PolicyClient(*server.address)
        delay[0] = 0.5
        busy.clear()
        thread = threading.Thread(target=lambda: answers.append(client.infer(observation())["actions"]))
        thread.start()
        busy.wait(5)
    thread.join()
    assert answers[0].shape == (4, 2)
    for each in (client, idle):
        each.connect_timeout = 0.1
        with pytest.raises(ServerUnreachableError):
            each.infer(observation())

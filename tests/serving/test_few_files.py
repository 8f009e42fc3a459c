"""A server whose process may open few files, as 256 on macOS, under floods of connections."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc  # noqa: F401 - by pytest when a thread raises, and then no file can be opened
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from served_policy import observation, serving

from flowpolicy.serving.client import PolicyClient, ServerUnreachableError
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.connections import Admission, ServerStatistics

resource = pytest.importorskip("resource")

FLOOD = """
import resource, selectors, socket, struct, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1024 if hard < 0 else min(1024, hard), hard))
host, port, places, first, then = sys.argv[1:]
port, places, first = int(port), int(places), first.encode()
selector, ends, opened = selectors.DefaultSelector(), time.monotonic() + 8, 0
def connect():
    connection = socket.create_connection((host, port))
    connection.sendall(first)
    if then == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    else:
        selector.register(connection, selectors.EVENT_READ)
for _ in range(places):
    connect()
print("flooded", flush=True)
selector.register(sys.stdin, selectors.EVENT_READ)
while time.monotonic() < ends and opened < 20_000:
    for key, _ in selector.select(0.005):
        if key.fileobj is sys.stdin:
            raise SystemExit
        selector.unregister(key.fileobj)
        key.fileobj.close()
    while len(selector.get_map()) <= places and opened < 20_000:
        connect()
        opened += 1
        if then == "reset":
            break
"""


@contextmanager
def few_files(count):
    """This process may open ``count`` more files than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + count, hard))  # noqa: PTH208
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def flood(server, places, first, then):
    arguments = [*map(str, server.address), str(places), first, then]
    program = subprocess.Popen(
        [sys.executable, "-c", FLOOD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert program.stdout.readline() == b"flooded\n"
        yield
    finally:
        program.communicate(timeout=10)


@pytest.mark.parametrize(
    ("first", "then"), [("", "hold"), ("GET / HTTP/1.1\r\n", "hold"), ("", "reset")], ids=str
)
def test_a_flood_of_connections_shuts_nobody_out_and_fills_no_log(sampler, caplog, first, then):
    with few_files(150), serving(sampler) as server, PolicyClient(*server.address) as connected:
        seconds = []
        with flood(server, 400, first, then):
            for _ in range(4):
                with PolicyClient(*server.address, connect_timeout=3) as new:
                    assert new.infer(observation())["actions"].shape == (4, 2)
                for _ in range(5):
                    started = time.perf_counter()
                    connected.infer(observation())
                    seconds.append(time.perf_counter() - started)
        assert np.median(seconds) < 0.1
        assert not server.statistics.failures["no file left for a connection"]
    assert len(caplog.records) < 30


def test_files_that_others_use_up_are_a_pause_and_no_flood_of_tracebacks(sampler, caplog):
    with few_files(120), serving(sampler) as server, PolicyClient(*server.address) as connected:
        held = []
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        os.close(held.pop())  # for the client's own end
        with pytest.raises(ServerUnreachableError):
            PolicyClient(*server.address, connect_timeout=0.3)
        assert connected.infer(observation())["actions"].shape == (4, 2)
        for file in held:
            os.close(file)
        with PolicyClient(*server.address, connect_timeout=5) as new:
            assert new.infer(observation())["actions"].shape == (4, 2)
        assert server.statistics.failures["no file left for a connection"]
    assert len(caplog.records) < 30


def test_clients_and_strangers_share_what_files_there_are():
    admission = Admission(ServerConfig(max_connections=100), ServerStatistics())
    for free, clients, handshakes in ((None, 100, 512), (10_000, 100, 512), (264, 100, 100), (94, 15, 15)):
        admission.share(free)
        assert (admission.max_clients, admission.max_handshakes) == (clients, handshakes)
    admission.share(0)
    assert admission.max_clients == admission.max_handshakes == 1


def test_a_flood_drives_out_the_connections_of_its_own_network():
    class Connection:
        is_gone = False

        def __init__(self, peer):
            self.peer, self.dropped = peer, False

        def drop(self, kind):
            self.dropped = True

    admission = Admission(ServerConfig(), ServerStatistics())
    admission.max_handshakes = 5
    slow = [Connection("10.0.0.1"), Connection("10.0.0.2")]
    crowd = [Connection("10.0.0.9") for _ in range(50)]
    for each in slow + crowd:
        admission.arrived(each)
    assert not any(each.dropped for each in slow)
    assert [each.dropped for each in crowd] == 47 * [True] + 3 * [False]

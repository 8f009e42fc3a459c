"""The connections of a policy server: admission, limits against clients that block it, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import ipaddress
import logging
import socket
import time
from collections import Counter
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response

from flowpolicy.evaluation.statistics import percentiles
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.listener import SPARE_FILES

log = logging.getLogger(__name__)

MAX_HANDSHAKES = 512
"""Connections that have not been let in; one more, and one of them is dropped."""

SPARE_AFTER_S = 10.0
"""Time without an answer after which a client gives way to a new one where the server is full."""

UNPROVEN_AFTER_S = 1.0
"""The same for one that has not yet asked for anything that could be answered."""

SEND_BUFFER = 65536
"""Bytes of answers that the system keeps for a client before it counts as not reading."""

FRAGMENTS_AT_ONCE = 256
FRAGMENTS_PER_S = 100.0
FRAGMENT_BYTES = 256
"""Pieces of messages and pings that a client may send: so many at once, so many a second, and one more for so
many bytes. Each costs the server as much time as a whole message."""

FIRST_BYTES = 2048
"""Of what has come that are looked at first: enough for a flood of fragments to be noticed."""

KEPT = 100_000
"""Latencies of the newest answers that are kept."""


class ServerStatistics:
    """Counts and latencies; it does not grow with time.

    Attributes:
        answered: requests answered with actions.
        failures: everything else by its kind, of requests and of connections.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.failures: Counter[str] = Counter()
        self._seconds = np.zeros(KEPT)

    def answer(self, seconds: float) -> None:
        """A request was answered ``seconds`` after it had arrived."""
        self._seconds[self.answered % KEPT] = seconds
        self.answered += 1

    def fail(self, kind: str) -> bool:
        """Count a failure; the 1st, 10th, 100th, ... of a kind are logged, and True is returned then."""
        self.failures[kind] += 1
        count = self.failures[kind]
        is_told = str(count).strip("0") == "1"
        if is_told:
            log.warning("%s (%d so far)", kind, count)
        return is_told

    def milliseconds(self) -> dict[str, float]:
        """p50, p95, p99, p99.9 and max from arrival to answer, of the newest answers; empty without any."""
        kept = self._seconds[: min(self.answered, KEPT)]
        return percentiles(1e3 * kept) if len(kept) else {}

    def line(self) -> str:
        """One line for a log."""
        times = self.milliseconds()
        speed = f", p50 {times['p50']:.2f} ms, p99 {times['p99']:.2f} ms" if times else ""
        return f"{self.answered} requests answered{speed}, {sum(self.failures.values())} failures"

    def content(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "answered": self.answered,
            "failures": dict(sorted(self.failures.items())),
            "milliseconds": self.milliseconds(),
        }


class Admission:
    """Keeps the connections of a server and decides on new ones.

    Args:
        config: limits of the server.
        statistics: where refusals are counted.

    Attributes:
        handshakes: all other open connections, oldest first: not yet let in, refused, or on their way out.
        clients: connections that were let in.
        max_handshakes: most of the former; one more, and one of them is dropped.
        max_clients: most of the latter.

    Raises:
        ConfigError: the token is unusable, or the address open to all without one.
    """

    def __init__(self, config: ServerConfig, statistics: ServerStatistics) -> None:
        self.config, self.statistics = config, statistics
        token = config.secret()
        self._authorization = None if token is None else f"Api-Key {token}".encode()
        self.handshakes: dict[GuardedConnection, None] = {}
        self.clients: set[GuardedConnection] = set()
        self.max_handshakes, self.max_clients = MAX_HANDSHAKES, config.max_connections
        self._fewest_clients = config.max_connections

    def share(self, free: int | None) -> None:
        """Share the files that the process may still open; None where nothing limits them.

        Raises:
            ConfigError: there are too few for a server.
        """
        places = self.config.max_connections + MAX_HANDSHAKES
        if free is not None:
            open_ones = len(self.clients) + len(self.handshakes)
            places = max(min(places, open_ones + free - SPARE_FILES), 2)
        clients = min(self.config.max_connections, places // 2)
        if clients < self._fewest_clients:
            self._fewest_clients = clients
            log.warning(
                "This process may open few files: at most %d clients at once, not %d; allow more with: "
                "ulimit -n 1024", clients, self.config.max_connections,
            )  # fmt: skip
        self.max_clients, self.max_handshakes = clients, min(places - clients, MAX_HANDSHAKES)
        self._drop_surplus()

    def arrived(self, connection: GuardedConnection) -> None:
        """A TCP connection was opened."""
        self.handshakes[connection] = None
        self._drop_surplus()

    def left(self, connection: GuardedConnection) -> None:
        """A TCP connection is gone."""
        if connection in self.handshakes or (connection in self.clients and not connection.is_served):
            connection.count("no websocket handshake")
            self.handshakes.pop(connection, None)
            self.clients.discard(connection)

    def dismiss(self, connection: GuardedConnection) -> None:
        """A client is no more; while it says farewell it may be dropped like a stranger."""
        self.clients.discard(connection)
        connection.is_counted = True
        if not connection.is_gone:
            self.handshakes[connection] = None
            self._drop_surplus()

    def _drop_surplus(self) -> None:
        """Drop the oldest of the address that has the most, so that a flood drives out itself."""
        while len(self.handshakes) > self.max_handshakes:
            [(crowd, _)] = Counter(each.peer for each in self.handshakes).most_common(1)
            oldest = next(each for each in self.handshakes if each.peer == crowd)
            del self.handshakes[oldest]
            oldest.drop("too many handshakes at once")

    def admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Called by the library with a handshake; None lets it in, else the answer that refuses it."""
        assert isinstance(connection, GuardedConnection)
        if request.path.partition("?")[0] == "/healthz":
            connection.is_counted = True
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if request.headers.get_all("Origin"):  # a web page that the user's browser has open
            connection.count("request of a web page")
            return connection.respond(http.HTTPStatus.FORBIDDEN, "Web pages may not use this server.\n")
        if self._authorization is not None:
            given = [value.encode("utf-8", "replace") for value in request.headers.get_all("Authorization")]
            if len(given) != 1 or not hmac.compare_digest(given[0], self._authorization):
                connection.count("wrong token" if given else "no token")
                response = connection.respond(
                    http.HTTPStatus.UNAUTHORIZED,
                    "This server needs the right token, in the header 'Authorization: Api-Key TOKEN'.\n",
                )
                response.headers["WWW-Authenticate"] = "Api-Key"
                return response
        # A connection that broke, or was dropped, since its request came must not take a place for ever.
        is_gone = connection not in self.handshakes
        if is_gone or (len(self.clients) >= self.max_clients and not self._make_room()):
            connection.count("server full")
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"The server has its {self.max_clients} clients; try again later.\n",
            )
        del self.handshakes[connection]  # those refused stay there until they are gone
        self.clients.add(connection)
        return None

    def _make_room(self) -> bool:
        """Close the client that has been without an answer the longest; False where all are in use."""
        now = time.monotonic()
        spare = [
            client
            for client in self.clients
            if not client.is_busy
            and now - client.last_used > (SPARE_AFTER_S if client.is_proven else UNPROVEN_AFTER_S)
        ]
        if not spare:
            return False
        longest = min(spare, key=lambda client: (client.is_proven, client.last_used))
        longest.count("idle while the server was full")
        self.dismiss(longest)
        longest.close_soon(1013, "idle while the server is full")
        return True


class GuardedConnection(ServerConnection):
    """Tells its server when it comes and goes, and is dropped where a message does not get finished.

    The library waits for the rest of a message for ever: a client that sends one byte now and then would keep
    its place.

    Attributes:
        last_used: moment of ``time.monotonic`` of the last answer with actions, or of the connection.
        malformed: messages in a row that could not be decoded.
        is_proven: it has had such an answer.
        is_served: a handler is at work for it.
        is_busy: a request of it is waiting or at work.
        is_counted: what ended it is in the statistics, or nothing is to be counted.
        is_gone: its TCP connection is no more.
        peer: the network that it comes from: an address of IPv4, the first half of one of IPv6.
    """

    def __init__(self, *arguments: Any, host: Admission, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.host = host
        self.last_used = time.monotonic()
        self.malformed = 0
        self.is_proven = self.is_served = self.is_busy = self.is_counted = self.is_gone = False
        self.peer = ""
        self._in_fragments = self._has_whole = False
        self._fragments_left, self._counted_at = float(FRAGMENTS_AT_ONCE), time.monotonic()
        self._patience: asyncio.TimerHandle | None = None
        self._farewell: asyncio.Future[None] | None = None

    def count(self, kind: str) -> None:
        """Count what ends this connection; only the first reason counts."""
        if not self.is_counted:
            self.is_counted = True
            self.host.statistics.fail(kind)

    def drop(self, kind: str) -> None:
        """Count the reason and end it without a farewell."""
        self.count(kind)
        self.transport.abort()

    def close_soon(self, code: int, reason: str) -> None:
        """Begin to close it with a farewell, without waiting for the other side."""
        self._farewell = asyncio.ensure_future(self.close(code, reason))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self.peer = _network((self.transport.get_extra_info("peername") or ("",))[0])
        # The system would keep megabytes of answers for a client that takes none.
        with contextlib.suppress(OSError):  # it is gone already
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER
            )
        self.host.arrived(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)
        self.is_gone = True
        self.host.left(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio; a message that came in one piece costs no timer."""
        self._has_whole = False
        # The library would parse all the fragments before the first of them arrives here.
        start, size = 0, FIRST_BYTES
        while start < len(data) and not self.transport.is_closing():
            super().data_received(data[start : start + size])
            start, size = start + size, 2 * size
        if self._has_whole and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        begun = self._in_fragments or not self._has_whole or len(self.protocol.reader.buffer) > 0
        if begun and self._patience is None and not self.transport.is_closing():
            self._be_patient()

    def _be_patient(self) -> None:
        # Busy, or with messages that wait for their turn, it is the server that is slow.
        if self._patience is not None and not self.is_busy and self.transport.is_reading():
            self.drop("message not finished in time")
            return
        self._patience = self.loop.call_later(self.host.config.message_timeout_s, self._be_patient)

    def process_event(self, event: Any) -> None:
        """Called by the library with the request of the handshake, then with every whole frame."""
        if self.transport.is_closing():
            return
        if isinstance(event, Frame):
            is_whole = event.fin and event.opcode in (Opcode.TEXT, Opcode.BINARY)
            if not is_whole and not self._may_send_fragment(len(event.data)):
                self.drop("too many fragments or pings")
                return
            if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._in_fragments = not event.fin
        self._has_whole = self._has_whole or not self._in_fragments
        super().process_event(event)

    def _may_send_fragment(self, size: int) -> bool:
        now = time.monotonic()
        earned = FRAGMENTS_PER_S * (now - self._counted_at) + size / FRAGMENT_BYTES
        self._counted_at = now
        self._fragments_left = min(self._fragments_left + earned, float(FRAGMENTS_AT_ONCE)) - 1
        return self._fragments_left >= 0


def _network(address: str) -> str:
    """One machine can have any address that shares the first 64 bits of an address of IPv6."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address) or found.ipv4_mapped:
        return address
    return str(int(found) >> 64)

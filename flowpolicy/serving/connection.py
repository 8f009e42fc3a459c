"""A websocket connection of the policy server that no client can hold open by being slow."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from typing import Any, Protocol

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode

from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.statistics import ServerStatistics

SEND_BUFFER = 65536
"""Bytes of answers that the system keeps for a client before it counts as not reading."""

FRAGMENTS_AT_ONCE = 256
FRAGMENTS_PER_S = 100.0
FRAGMENT_BYTES = 256
"""Pieces of messages and pings that a client may send: so many at once, so many a second, and one more for so
many bytes. Each costs the server as much time as a whole message."""

FIRST_BYTES = 2048
"""Of what has come that are looked at first: enough for a flood of fragments to be noticed."""


class Host(Protocol):
    """What a connection needs of its server."""

    config: ServerConfig
    statistics: ServerStatistics

    def arrived(self, connection: GuardedConnection) -> None:
        """A TCP connection was opened."""

    def left(self, connection: GuardedConnection) -> None:
        """A TCP connection is gone."""


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

    def __init__(self, *arguments: Any, host: Host, **settings: Any) -> None:
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
        # The library would take all the fragments apart before the first of them is seen here.
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
        if self._patience is not None and not self.is_busy:  # else it is the server that is slow
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

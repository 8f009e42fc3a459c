"""Who gets into the policy server: token, web pages, and room for those who ask for actions."""

from __future__ import annotations

import hmac
import http
import time
from collections import OrderedDict

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from flowpolicy.control.serving.config import ServerConfig
from flowpolicy.control.serving.connection import GuardedConnection
from flowpolicy.control.serving.statistics import ServerStatistics

MAX_HANDSHAKES = 512
"""Connections that have not yet been let in; one more, and the oldest of them is dropped."""

SPARE_AFTER_S = 10.0
"""Time without an answer after which a client gives way to a new one where the server is full."""

UNPROVEN_AFTER_S = 1.0
"""The same for one that has not yet asked for anything that could be answered."""


class Admission:
    """Keeps the connections of a server and decides on new ones.

    Args:
        config: limits of the server.
        statistics: where refusals are counted.

    Attributes:
        handshakes: connections that are not clients, or not yet, oldest first.
        clients: connections that were let in.

    Raises:
        ConfigError: the token is unusable, or the address open to all without one.
    """

    def __init__(self, config: ServerConfig, statistics: ServerStatistics) -> None:
        self.config, self.statistics = config, statistics
        token = config.secret()
        self._authorization = None if token is None else f"Api-Key {token}".encode()
        self.handshakes: OrderedDict[GuardedConnection, None] = OrderedDict()
        self.clients: set[GuardedConnection] = set()

    def arrived(self, connection: GuardedConnection) -> None:
        """A TCP connection was opened."""
        self.handshakes[connection] = None
        if len(self.handshakes) > MAX_HANDSHAKES:
            oldest, _ = self.handshakes.popitem(last=False)
            oldest.drop("too many handshakes at once")

    def left(self, connection: GuardedConnection) -> None:
        """A TCP connection is gone."""
        if connection in self.handshakes or (connection in self.clients and not connection.is_served):
            connection.count("no websocket handshake")
            self.handshakes.pop(connection, None)
            self.clients.discard(connection)

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
        if is_gone or (len(self.clients) >= self.config.max_connections and not self._make_room()):
            connection.count("server full")
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"The server has its {self.config.max_connections} clients; try again later.\n",
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
        self.clients.discard(longest)
        longest.count("idle while the server was full")
        longest.close_soon(1013, "idle while the server is full")
        return True

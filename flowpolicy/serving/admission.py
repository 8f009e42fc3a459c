"""Who gets into the policy server: token, web pages, and room for those who ask for actions."""

from __future__ import annotations

import hmac
import http
import logging
import time
from collections import Counter

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.connection import GuardedConnection
from flowpolicy.serving.listener import SPARE_FILES
from flowpolicy.serving.statistics import ServerStatistics

log = logging.getLogger(__name__)

MAX_HANDSHAKES = 512
"""Connections that have not been let in; one more, and one of them is dropped."""

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

"""The policy server: websocket and msgpack, in the protocol of openpi's ``WebsocketClientPolicy``.

A client connects, with the header ``Authorization: Api-Key TOKEN`` where the server has a token; the first
message it gets is the metadata. Then every binary message is a request and is answered by a binary message,
or by a text message that says in one sentence what was wrong with it. ``/healthz`` answers 200 over plain
HTTP.

Inference runs in one thread beside the event loop. Each connection has one request at work or waiting, and
waiting ones are served in the order in which they came: a client that floods the server waits for its
turn like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from flowpolicy.errors import FlowPolicyError
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.connections import MAX_HANDSHAKES, Admission, GuardedConnection, ServerStatistics
from flowpolicy.serving.listener import (
    BACKLOG,
    SPARE_FILES,
    Listener,
    allow_open_files,
    free_files,
    is_shortage,
    listen_on,
)
from flowpolicy.serving.messages import MessageError, encode
from flowpolicy.serving.service import PolicyService

log = logging.getLogger(__name__)
# Its own records are a traceback for every stranger's bad handshake; what matters is counted here.
_library_log = logging.getLogger(f"{__name__}.websockets")
_library_log.setLevel(logging.CRITICAL + 1)

MAX_MALFORMED = 10
"""Messages in a row that are none of the protocol, after which a client is closed."""

PAUSE_AFTER_ERROR_S = 0.05
"""Time before the next message of a client is read after one that had to be refused."""

LOG_EVERY_S = 60.0

_CLOSED_FOR = {
    1002: "broken websocket frames",
    1007: "text that is not UTF-8",
    1009: "message too large",
    1011: "no answer to pings",
}


class PolicyServer:
    """Serves a policy until it is stopped.

    Args:
        service: what answers.
        config: address, token and limits.
        listener: a bound socket, where the address was taken beforehand.

    Attributes:
        statistics: of requests and of what went wrong.
        address: host and port.

    Raises:
        ConfigError: the address is taken or open to all without a token, or the token is unusable.
    """

    def __init__(
        self, service: PolicyService, config: ServerConfig, listener: Listener | None = None
    ) -> None:
        self.service, self.config = service, config
        self.statistics = ServerStatistics()
        self._admission = Admission(config, self.statistics)
        self._listener = listen_on(config) if listener is None else listener
        host, port = self._listener.getsockname()[:2]
        self.address: tuple[str, int] = (host, port)
        self._metadata = encode(service.metadata)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._stop_asked = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or :meth:`stop`; requests under way are answered first.

        This process' limit of open files is raised as far as it may be, where it is too low for the clients.
        """
        # The inference thread asks for the interpreter a few times in each request, and under a flood of
        # connections waits this long each time.
        sys.setswitchinterval(0.0005)
        allow_open_files(self.config.max_connections + MAX_HANDSHAKES + SPARE_FILES)
        asyncio.run(self._main(threading.Event(), with_signals=True))

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[str, int]]:
        """Serve from another thread inside the block; yields host and port."""
        ready = threading.Event()
        failures: list[BaseException] = []

        def serve_here() -> None:
            try:
                asyncio.run(self._main(ready, with_signals=False))
            except BaseException as failure:
                failures.append(failure)
            finally:
                ready.set()

        thread = threading.Thread(target=serve_here, name="policy server")
        thread.start()
        ready.wait()
        if failures:
            raise failures[0]
        try:
            yield self.address
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        """Ask the server to end, from any thread."""
        self._stop_asked.set()
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop.set)

    # What follows runs in the event loop.

    async def _main(self, ready: threading.Event, *, with_signals: bool) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        config = self.config
        try:
            await self._loop.run_in_executor(self._worker, self.service.warm_up)
            self._loop.set_exception_handler(self._failed)
            self._admission.share(free_files())
            connect = functools.partial(GuardedConnection, host=self._admission)
            server = await serve(
                self._serve, sock=self._listener, process_request=self._admission.admit, backlog=BACKLOG,
                create_connection=cast(type[ServerConnection], connect), logger=_library_log,
                compression=None, open_timeout=config.handshake_timeout_s, close_timeout=2.0,
                ping_interval=config.ping_interval_s, ping_timeout=config.ping_interval_s,
                max_size=self.service.max_message_bytes, max_queue=1, server_header=None,
            )  # fmt: skip
            ready.set()
            host, port = self.address
            log.info("Serving on ws://%s:%d; Ctrl-C ends it.", host, port)
            with self._signals() if with_signals else contextlib.nullcontext():
                await self._until_stopped()
            await self._end(server)
        finally:
            self._listener.close()
            self._worker.shutdown(wait=False, cancel_futures=True)

    async def _until_stopped(self) -> None:
        assert self._stop is not None
        if self._stop_asked.is_set():  # before there was a loop to tell
            return
        told = -1
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOG_EVERY_S)
            self._admission.share(free_files())
            if self.statistics.answered != told:
                told = self.statistics.answered
                log.info("%s; %d clients", self.statistics.line(), len(self._admission.clients))

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Called by asyncio where a callback raises, which strangers could otherwise fill the log with."""
        error = context.get("exception")
        if is_shortage(error):
            self.statistics.fail("no file left for a connection")
            self._admission.share(free_files())
            loop.call_later(2.0, lambda: self._admission.share(free_files()))
        elif self.statistics.fail("error of the event loop"):
            log.error("%s", context["message"], exc_info=error)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server; a second one ends the program at once."""
        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

        def restore() -> None:
            for each in numbers:
                loop.remove_signal_handler(each)

        def received(number: int) -> None:
            log.info("%s: finishing the requests under way.", signal.Signals(number).name)
            restore()
            self.stop()

        # On Windows Ctrl-C raises KeyboardInterrupt instead.
        with contextlib.suppress(NotImplementedError):
            for number in numbers:
                loop.add_signal_handler(number, received, number)
        try:
            yield
        finally:
            with contextlib.suppress(NotImplementedError):
                restore()

    async def _end(self, server: Server) -> None:
        """Let clients whose request is at work have their answer, close all others, and wait for them."""
        self._stop_asked.set()
        server.close(close_connections=False)
        for connection in list(self._admission.handshakes):
            connection.transport.abort()
        for connection in list(self._admission.clients):
            if not connection.is_busy:
                connection.close_soon(1001, "the server ends")
        try:
            async with asyncio.timeout(self.config.stop_timeout_s):
                await server.wait_closed()
        except TimeoutError:
            for connection in list(self._admission.clients):
                connection.transport.abort()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.wait_closed(), 1.0)

    async def _serve(self, connection: ServerConnection) -> None:
        """One client, from the metadata to its end."""
        assert isinstance(connection, GuardedConnection)
        connection.is_served = True
        try:
            await self._send(connection, self._metadata)
            while not self._stop_asked.is_set():
                async with asyncio.timeout(self.config.idle_timeout_s):
                    message = await connection.recv()
                connection.is_busy = True
                answer = await self._answer(connection, message)
                await self._send(connection, answer)
                connection.is_busy = False
                if connection.malformed >= MAX_MALFORMED:
                    connection.count("malformed messages in a row")
                    await connection.close(1008, "malformed messages")
                    return
                if isinstance(answer, str):
                    await asyncio.sleep(PAUSE_AFTER_ERROR_S)
            await connection.close(1001, "the server ends")
        except TimeoutError:
            connection.count("idle")
            await connection.close(1001, "idle for too long")
        except ConnectionClosed as closed:
            if closed.sent is None:
                connection.count("connection lost")
            elif closed.sent.code in _CLOSED_FOR and not closed.rcvd_then_sent:
                connection.count(_CLOSED_FOR[closed.sent.code])
        except Exception:  # nothing a client sends may end the server
            log.exception("A connection ended by an error of the server's.")
            connection.count("error of the server's")
        finally:
            connection.is_served = connection.is_busy = False
            self._admission.dismiss(connection)

    async def _answer(self, connection: GuardedConnection, message: bytes | str) -> bytes | str:
        received = time.perf_counter()
        work = self.service.answer(message, received)
        answer = None
        try:
            while answer is None:
                answer = await asyncio.get_running_loop().run_in_executor(
                    self._worker, _turn, connection, work
                )
        except FlowPolicyError as error:
            is_malformed = isinstance(error, MessageError)
            connection.malformed = connection.malformed + 1 if is_malformed else 0
            self.statistics.fail("malformed message" if is_malformed else "bad request")
            return str(error)
        except Exception as error:
            if self.statistics.fail("policy error"):
                log.exception("The policy raised an exception.")
            return f"The server could not sample a chunk ({type(error).__name__}); its log says why."
        if answer:
            self.statistics.answer(time.perf_counter() - received)
            connection.is_proven, connection.last_used, connection.malformed = True, time.monotonic(), 0
        return answer

    async def _send(self, connection: GuardedConnection, message: bytes | str) -> None:
        try:
            async with asyncio.timeout(self.config.write_timeout_s):
                await connection.send(message)
        except TimeoutError:
            connection.drop("client does not read")


def _turn(connection: GuardedConnection, work: Iterator[bytes | None]) -> bytes | None:
    """In the inference thread: the next part of an answer; nothing is computed for a client that has left."""
    return next(work) if connection.protocol.state is State.OPEN else b""

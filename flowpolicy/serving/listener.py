"""The socket that a policy server listens on, and how many connections the process can hold open."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Any

from flowpolicy.errors import ConfigError
from flowpolicy.serving.config import ServerConfig

BACKLOG = 1024
"""Connections that the system holds while the server is busy; those beyond would wait for seconds."""

AT_ONCE = 2
"""New connections that are taken before the open ones have their turn."""

SPARE_FILES = 64
"""Files of the process that connections leave alone: its own, and those of connections that come or go."""

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener(socket.socket):
    """Takes connections a few at a time, so that a flood of them cannot hold up the event loop.

    asyncio would take all that wait in one go, and where the process has no file left for them, would fail as
    often as there could be connections waiting, with a traceback each.
    """

    _taken = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """Called by asyncio again and again, until it raises.

        Raises:
            BlockingIOError: nobody waits, or others have their turn first.
            ConnectionAbortedError: the connection broke while it waited.
            OSError: the system lacks files or memory; asyncio comes back after a second.
        """
        if self._taken >= AT_ONCE:
            self._taken = 0
            raise BlockingIOError(errno.EAGAIN, "others have their turn")
        try:
            accepted = super().accept()
        except (BlockingIOError, InterruptedError):
            self._taken = 0
            raise
        except OSError as error:
            self._taken = AT_ONCE  # asyncio may ask once more before it pauses
            if is_shortage(error):
                raise
            raise ConnectionAbortedError(errno.ECONNABORTED, "it broke while it waited") from error
        self._taken += 1
        return accepted


def is_shortage(error: BaseException | None) -> bool:
    """Whether the system had no file or memory left."""
    return isinstance(error, OSError) and error.errno in _SHORTAGES


def listen_on(config: ServerConfig) -> Listener:
    """A socket bound to the config's address, which nobody else can take from then on.

    Raises:
        ConfigError: the address is taken, not this machine's, or not allowed.
    """
    where = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = Listener(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere this lets two programs share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except socket.gaierror as error:
        raise ConfigError(f"host={config.host} is no address of this machine; use 127.0.0.1.") from error
    except OSError as error:
        hints = {
            errno.EADDRINUSE: "another program has it; stop it, or choose another with port=",
            errno.EACCES: "ports below 1024 need rights; choose another with port=",
            errno.EADDRNOTAVAIL: "it is no address of this machine; use host=127.0.0.1",
        }
        hint = hints.get(error.errno or 0, error.strerror or str(error))
        raise ConfigError(f"The server cannot listen on {where}: {hint}.") from error
    return listener


def allow_open_files(wanted: int) -> None:
    """Raise this process' limit of open files to ``wanted`` more than it has, as far as it may."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted += _open_files()
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def free_files() -> int | None:
    """Files that this process may still open; None where nothing limits them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - _open_files()
    except OSError as error:
        return 0 if is_shortage(error) else None


def _open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())

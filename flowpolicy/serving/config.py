"""Settings of a policy server: address, access, limits and timeouts."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from flowpolicy.errors import ConfigError
from flowpolicy.ranges import Allowed, PositiveFloat, PositiveInt, between
from flowpolicy.settings import Settings

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "FLOWPOLICY_TOKEN"
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{8,256}")  # what a header holds without quoting


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Settings):
    """Settings of a policy server.

    Attributes:
        host: address to listen on; the default is reachable from this machine alone.
        port: 0 takes a free one.
        token: that clients must show. Other users of the machine can read it on a command line.
        token_file: file that holds the token. Without either, the environment variable FLOWPOLICY_TOKEN.
        allow_anonymous: listen on a network without a token.
        max_connections: clients at once; beyond, one that got no actions for 10 s gives way to a new one.
        max_batch: most chunks of one request; it decides how large a message may be.
        handshake_timeout_s: from the connection to the end of the websocket handshake.
        message_timeout_s: from the first byte of a message to its last.
        write_timeout_s: until a client has taken its answer.
        idle_timeout_s: without a request.
        ping_interval_s: between pings, and until one must be answered.
        stop_timeout_s: for the requests under way when the server ends.
    """

    host: Annotated[str, Allowed(bool, "an address, such as 127.0.0.1, or 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, between(0, 65535)] = 8000
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    allow_anonymous: bool = False
    max_connections: PositiveInt = 64
    max_batch: PositiveInt = 64
    handshake_timeout_s: PositiveFloat = 5.0
    message_timeout_s: PositiveFloat = 10.0
    write_timeout_s: PositiveFloat = 10.0
    idle_timeout_s: PositiveFloat = 600.0
    ping_interval_s: PositiveFloat = 20.0
    stop_timeout_s: PositiveFloat = 5.0

    def secret(self) -> str | None:
        """The token that clients must show; None where anyone may use the server.

        Raises:
            ConfigError: two tokens, an unreadable or weak one, or none on an address that others can reach.
        """
        if self.token is not None:
            if self.token_file is not None:
                raise ConfigError("token and token_file are both given; leave out token.")
            return _checked(self.token, "token")
        token = token_of(None if self.token_file is None else Path(self.token_file))
        if token is not None:
            return token
        if not self.allow_anonymous and not _is_loopback(self.host):
            raise ConfigError(
                f"host={self.host} lets other machines move the robot; give token_file=FILE or "
                f"{TOKEN_VARIABLE}, or allow_anonymous=true on a network you trust."
            )
        return None


def token_of(file: Path | None) -> str | None:
    """The token in a file, or without one that of the environment variable FLOWPOLICY_TOKEN; None: neither.

    Raises:
        ConfigError: the file cannot be read, or the token is a weak one.
    """
    if file is not None:
        return _checked(_read_token(file), str(file))
    found = os.environ.get(TOKEN_VARIABLE)
    return _checked(found, TOKEN_VARIABLE) if found else None


def _checked(token: str, source: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"The token of {source} is unusable; make one of 8 to 256 letters, digits or ._~+/=-, "
            "e.g. with: openssl rand -hex 16"
        )
    return token


def _read_token(file: Path) -> str:
    try:
        token = file.expanduser().read_text().strip()
        is_private = os.name != "posix" or not file.expanduser().stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file={file} cannot be read; give a file that holds the token.") from error
    if not is_private:
        log.warning("Other users can read %s; make it yours alone: chmod 600 %s", file, file)
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

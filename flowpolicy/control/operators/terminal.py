"""Single keys from the terminal, without Enter and without waiting."""

from __future__ import annotations

import atexit
import os
import select
import sys
from typing import Any

from flowpolicy.errors import ConfigError


class Terminal:
    """The program's terminal, without line editing and echo until it is closed; Ctrl-C works as ever.

    Raises:
        ConfigError: standard input is no terminal, or the system has no such terminals.
    """

    def __init__(self) -> None:
        try:
            import termios
            import tty
        except ImportError as error:
            raise ConfigError(
                "Keys are read from a terminal of Linux or macOS; use operator=gamepad."
            ) from error
        if sys.stdin is None or not sys.stdin.isatty():
            raise ConfigError(
                "The operator's keys come from a terminal, and standard input is none; start the program in "
                "one, or use operator=gamepad."
            )
        self._termios, self._file = termios, sys.stdin.fileno()
        self._before: list[Any] | None = termios.tcgetattr(self._file)
        atexit.register(self.close)
        tty.setcbreak(self._file)

    def typed(self) -> str:
        """What was typed since the last call."""
        read = b""
        while select.select([self._file], [], [], 0)[0]:
            found = os.read(self._file, 64)
            if not found:
                raise OSError("the terminal was closed")
            read += found
        return read.decode(errors="replace")

    def close(self) -> None:
        """Restore the terminal; a second call does nothing."""
        if self._before is not None:
            self._termios.tcsetattr(self._file, self._termios.TCSADRAIN, self._before)
            self._before = None
            atexit.unregister(self.close)

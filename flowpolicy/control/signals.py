"""The signals that end a program, as a call: a robot is not left with its last command standing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
"""Those that end a program and can be handled; SIGKILL cannot."""


@contextmanager
def ending_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call ``on_signal`` with the number of every ending signal inside the block, instead of ending.

    Python handles signals in the main thread alone: in another one nothing changes. A signal that the program
    ignores (SIGHUP under ``nohup``) stays ignored. The handlers of before are set again afterwards.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            found = signal.getsignal(number)
            if found is not None and found is not signal.SIG_IGN:
                before[number] = found
                signal.signal(number, lambda number, frame: on_signal(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Ctrl-C at places of the program's own choosing, so that it finds nothing half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back inside the block; the function that is yielded raises it, where one has come.

    One that comes after the last call is raised when the block has ended. Outside the main thread, which
    alone receives signals, and where the program ignores Ctrl-C (``nohup``), nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield lambda: None
        return
    came = threading.Event()

    def check() -> None:
        if came.is_set():
            came.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
        if came.is_set():
            signal.raise_signal(signal.SIGINT)

"""A watchdog beside the loop's thread: a driver's call that does not return must not mean silence."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class DriverWatch:
    """Knows which call of the robot the loop's thread is in, and speaks when it stays there.

    Args:
        timeout_s: after which a call counts as hanging.
        on_hang: called from the watchdog's thread with ``observe`` or ``act``, and whether it is the first
            time for this call; again every quarter of the timeout.
        wants_out: whether the loop was told to end: a hanging call is then broken off by a signal to the main
            thread, where the loop runs there; the signal's handler must raise.
    """

    def __init__(
        self, timeout_s: float, on_hang: Callable[[str, bool], None], wants_out: Callable[[], bool]
    ) -> None:
        self.timeout_s, self._on_hang, self._wants_out = timeout_s, on_hang, wants_out
        self._call: tuple[str, float] = ("", 0.0)

    def enter(self, call: str) -> None:
        """The loop's thread calls the robot; an empty name when it is back."""
        self._call = (call, time.monotonic())

    def hanging(self) -> str:
        """The call that hangs, or nothing."""
        call, since = self._call
        return call if call and time.monotonic() - since > self.timeout_s else ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the block; it is entered in the loop's thread."""
        ended = threading.Event()
        in_main = threading.current_thread() is threading.main_thread()
        thread = threading.Thread(target=self._watch, args=(ended, in_main), daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        finally:
            ended.set()  # it may itself be held up in the driver: nobody waits for it

    def _watch(self, ended: threading.Event, in_main: bool) -> None:
        told = 0.0
        while not ended.wait(self.timeout_s / 4):
            since = self._call[1]
            if call := self.hanging():
                self._on_hang(call, told != since)
                told = since
                if in_main and self._wants_out() and self.hanging() and hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

"""What a control loop needs of the operating system.

A clock; a processor that leaves it undisturbed; the signals that end programs, as calls; a robot that nobody
else drives; and a watchdog for calls of the robot that do not return.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from flowpolicy.control.robot import Robot, innermost
from flowpolicy.errors import TaskError

log = logging.getLogger(__name__)

SPIN_S = 3e-4
"""A sleep ends some 60 us late; the last stretch before a deadline is spent looking at the clock instead."""

LEVEL = 10
"""Real-time priority, 1 to 99: above all that is scheduled fairly, below the system's own threads."""

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
"""Signals that end a program and can be handled; SIGKILL cannot."""


class Clock(Protocol):
    """Seconds that only go forwards, and a way to wait for them."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def sleep_until(self, moment: float) -> None:
        """Return at ``moment``, or at once where it has passed."""


class MonotonicClock:
    """``time.monotonic``: setting the machine's time does not touch it, and all processes share it."""

    def now(self) -> float:
        """Seconds of ``time.monotonic``."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Sleep until shortly before, then watch the clock."""
        while (left := moment - SPIN_S - time.monotonic()) > 0:
            time.sleep(left)
        while time.monotonic() < moment:
            pass


@contextmanager
def real_time_priority(wanted: bool = True, whose: str = "The loop") -> Iterator[None]:
    """Schedule this thread first-in first-out (SCHED_FIFO) inside the block.

    Linux allows it to root, or to users with an ``rtprio`` limit (``/etc/security/limits.conf``). Elsewhere
    nothing changes, and one sentence is logged.
    """
    given = False
    if wanted and hasattr(os, "sched_setscheduler"):
        try:
            # Threads and processes started from this one do not inherit it.
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(LEVEL))
            given = True
        except OSError as error:
            log.info("%s: no real-time priority (%s); an rtprio limit allows it.", whose, error.strerror)
    try:
        yield
    finally:
        if given:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside the block: the loop makes no cycles, and a full one takes milliseconds."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


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


_driven: set[int] = set()
_guard = threading.Lock()


@contextmanager
def exclusive(robot: Robot) -> Iterator[None]:
    """Hold a robot, and its device where the spec names one, for the block: two loops would send their safe
    actions into each other's motion.

    The device is held for all processes of this machine by a locked file in the folder for temporary files;
    the system lets go of it when the process ends, however it ends.

    Raises:
        TaskError: another loop controls it.
    """
    name, device, held = robot.spec.name, robot.spec.device, id(innermost(robot))
    with _guard:
        if held in _driven:
            raise TaskError(f"{name} is controlled by another control loop already; end that one first.")
        _driven.add(held)
    descriptor = None
    try:
        if device:
            descriptor = _locked(name, device)
        yield
    finally:
        _driven.discard(held)
        if descriptor is not None:
            os.close(descriptor)


def _locked(name: str, device: str) -> int:
    path = Path(tempfile.gettempdir()) / f"flowpolicy-{re.sub(r'[^A-Za-z0-9.-]', '_', device)}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise TaskError(
            f"{path}, which keeps {device} for one program, cannot be opened: {error}."
        ) from error
    try:
        _lock(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise TaskError(
            f"{name} at {device} is controlled by another program already; end that one first."
        ) from error
    return descriptor


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class DriverWatch:
    """Watches the loop's calls of the robot, and reports one that does not return.

    Args:
        timeout_s: after which a call counts as hanging.
        on_hang: called from the watchdog's thread with ``observe`` or ``act``, and whether it is the first
            time for this call; again every quarter of the timeout.
        wants_out: whether the loop is to end: a hanging call is then interrupted by a signal to the main
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

"""Keeping the loop's thread undisturbed: real-time scheduling where allowed, no garbage collection."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LEVEL = 10  # of 1 to 99: above everything that is scheduled fairly, below the system's own threads


@contextmanager
def real_time_priority(wanted: bool = True) -> Iterator[bool]:
    """Schedule this thread first-in first-out (SCHED_FIFO) inside the block.

    Linux allows it to root, or to users with an ``rtprio`` limit (``/etc/security/limits.conf``). Elsewhere
    nothing changes, and one sentence is logged.

    Yields:
        Whether the thread has it.
    """
    given = False
    if wanted and hasattr(os, "sched_setscheduler"):
        try:
            # Threads and processes started from this one do not inherit it.
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(LEVEL))
            given = True
        except OSError as error:
            log.info(
                "The loop runs without real-time priority (%s); an rtprio limit allows it.", error.strerror
            )
    try:
        yield given
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

"""One control loop per robot: two would send their safe actions into each other's motion."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowpolicy.control.robot import Robot
from flowpolicy.errors import TaskError

_driven: set[int] = set()
_guard = threading.Lock()


@contextmanager
def exclusive(robot: Robot) -> Iterator[None]:
    """Hold a robot, and its device where the spec names one, for the block.

    The device is held for all processes of this machine by a locked file in the folder for temporary files;
    the system lets go of it when the process ends, however it ends.

    Raises:
        TaskError: another loop drives it.
    """
    with _guard:
        if id(robot) in _driven:
            raise TaskError(
                f"{robot.spec.name} is driven by another control loop already; end that one first."
            )
        _driven.add(id(robot))
    descriptor = None
    try:
        if robot.spec.device:
            descriptor = _locked(robot.spec.name, robot.spec.device)
        yield
    finally:
        _driven.discard(id(robot))
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
            f"{name} at {device} is driven by another program already; end that one first."
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

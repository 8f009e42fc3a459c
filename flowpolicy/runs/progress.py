"""Progress of long work: a bar on a terminal, a line at intervals elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar, overload

from flowpolicy.rounding import three_digits

T = TypeVar("T")

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""Between lines where there is no terminal; work that is done sooner says nothing."""


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """To be used in a ``with`` statement; on a terminal it draws with tqdm, else it logs a line now and then.

    The lines come from a thread of their own, so that work whose units take minutes is heard of too.

    Args:
        total: units of work; None where that is not known.
        description: of the work.
        done: units that were done before, in a run that is continued.
        silent: neither draw nor log.
    """

    def __init__(self, total: int | None, description: str, *, done: int = 0, silent: bool = False) -> None:
        self._total, self._description, self._silent = total, description, silent
        self._done = self._done_when_told = done
        self._started = self._told = time.monotonic()
        self._metrics: dict[str, Any] = {}
        self._bar: Any = None
        self._ended = threading.Event()
        if silent:
            return
        # Asked here and not by tqdm(disable=None), whose monitoring thread would start in every process.
        if sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total,
                    initial=done,
                    desc=description,
                    file=sys.stderr,
                    dynamic_ncols=True,
                    leave=False,
                )
        if self._bar is None:
            threading.Thread(target=_tell, args=(self._ended, weakref.ref(self)), daemon=True).start()

    def update(self, n: int = 1, **metrics: float | int | str) -> None:
        """Advance by ``n`` and show ``metrics`` behind; numbers are shortened to three digits."""
        if self._silent:
            return
        self._done += n
        self._metrics = metrics or self._metrics
        if self._bar is not None:
            if metrics:
                self._bar.set_postfix(_shown(metrics), refresh=False)
            self._bar.update(n)

    def line(self) -> str:
        """What is done and after how long, the rate since the line before, the time that is left, metrics."""
        now, done = time.monotonic(), self._done
        rate = (done - self._done_when_told) / max(now - self._told, 1e-9)
        self._told, self._done_when_told = now, done
        count = f"{done}"
        if self._total:
            count = f"{done} of {self._total} ({100 * done // self._total}%)"
        parts = [f"{self._description}: {count} after {_duration(now - self._started)}"]
        if rate > 0:
            parts.append(f"{three_digits(rate)}/s")
            if self._total:
                parts.append(f"{_duration((self._total - done) / rate)} left")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in _shown(self._metrics).items())])

    def close(self) -> None:
        """Take the bar off the terminal, or end the lines."""
        self._ended.set()
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _tell(ended: threading.Event, bar: Callable[[], ProgressBar | None]) -> None:
    """Log a line at intervals, until the work has ended or nobody holds its bar any more."""
    while not ended.wait(LINE_EVERY_S):
        here = bar()
        if here is None:
            return
        log.info("%s", here.line())
        del here


def progress_bar(total: int | None, description: str, *, done: int = 0) -> ProgressBar:
    """A bar over ``total`` units: ``with progress_bar(100, "train") as bar: bar.update(1, loss=0.2)``.

    ``done`` of them were done before. None units: nothing is shown at all.
    """
    return ProgressBar(total, description, done=done, silent=total is None)


@overload
def progress(items: int, description: str) -> Iterator[int]: ...


@overload
def progress(items: Iterable[T], description: str) -> Iterator[T]: ...


def progress(items: Iterable[Any] | int, description: str) -> Iterator[Any]:
    """Iterate over ``items`` (or over ``range(items)``) behind a bar."""
    sequence: Iterable[Any] = range(items) if isinstance(items, int) else items
    with ProgressBar(len(sequence) if isinstance(sequence, Sized) else None, description) as bar:
        for item in sequence:
            yield item
            bar.update()


def _duration(seconds: float) -> str:
    """As a reader wants it: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _shown(metrics: dict[str, Any]) -> dict[str, str]:
    return {
        name: three_digits(value) if isinstance(value, float) else str(value)
        for name, value in metrics.items()
        if value == value  # NaN is not known yet
    }

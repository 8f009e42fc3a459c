"""Progress of long work: a bar on a terminal, a line at intervals elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar, overload

T = TypeVar("T")

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""Between lines where there is no terminal; work that is done sooner says nothing."""


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """To be used in a ``with`` statement; on a terminal it draws with tqdm, else it logs a line now and then.

    Args:
        total: units of work; None where that is not known.
        description: of the work.
        silent: neither draw nor log.
    """

    def __init__(self, total: int | None, description: str, *, silent: bool = False) -> None:
        self._total, self._description, self._silent = total, description, silent
        self._done, self._started = 0, time.monotonic()
        self._told = self._started
        self._bar: Any = None
        # Asked here and not by tqdm(disable=None), whose monitoring thread would start in every process.
        if not silent and sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total, desc=description, file=sys.stderr, dynamic_ncols=True, leave=False
                )

    def update(self, n: int = 1, **metrics: float | int | str) -> None:
        """Advance by ``n`` and show ``metrics`` behind; numbers are shortened to three digits."""
        if self._silent:
            return
        self._done += n
        if self._bar is not None:
            if metrics:
                self._bar.set_postfix(_shown(metrics), refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._told >= LINE_EVERY_S:
            self._told = time.monotonic()
            log.info("%s", self._line(self._told - self._started, _shown(metrics)))

    def _line(self, seconds: float, metrics: dict[str, str]) -> str:
        done = f"{self._done}"
        if self._total:
            done = f"{self._done} of {self._total} ({100 * self._done // self._total}%)"
        behind = "".join(f", {name} {value}" for name, value in metrics.items())
        return f"{self._description}: {done} after {seconds:.0f} s{behind}"

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(total: int | None, description: str) -> ProgressBar:
    """A bar over ``total`` units: ``with progress_bar(100, "train") as bar: bar.update(1, loss=0.2)``.

    None units: nothing is shown at all.
    """
    return ProgressBar(total, description, silent=total is None)


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


def _shown(metrics: dict[str, Any]) -> dict[str, str]:
    return {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in metrics.items()}

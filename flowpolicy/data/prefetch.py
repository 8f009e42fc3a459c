"""Prefetching by a thread: later batches of training, or an iterator's next items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Gives ``make(step)`` for consecutive steps, the next ones being made meanwhile.

    Args:
        make: a pure function of the step, called in a thread; what it raises is raised where it is asked for.
        last: no step from here on is made ahead.
        ahead: steps made ahead.
    """

    def __init__(self, make: Callable[[int], T], last: int, ahead: int = 2) -> None:
        self._make, self._last, self._ahead = make, last, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._waiting: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """``make(step)``."""
        for wanted in range(step, min(step + 1 + self._ahead, self._last)):
            if wanted not in self._waiting:
                self._waiting[wanted] = self._pool.submit(self._make, wanted)
        ready = self._waiting.pop(step, None)
        for passed in [number for number in self._waiting if number < step]:
            self._waiting.pop(passed).cancel()
        return self._make(step) if ready is None else ready.result()

    def settle(self) -> None:
        """Wait until nothing is being made."""
        wait(self._waiting.values())

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def read_ahead(items: Iterator[T], ahead: int = 1) -> Generator[T]:
    """The same items, the next ones being made by a thread meanwhile; close it to end the thread early.

    Args:
        items: an iterator that is used in the thread alone; what it raises is raised here.
        ahead: items made ahead, besides the one that was given last.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting = deque(pool.submit(next, items, _END) for _ in range(ahead))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

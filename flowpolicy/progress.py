"""The one place that draws progress bars: on a terminal with tqdm, silent everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar, overload

T = TypeVar("T")


class ProgressBar:
    """A bar to be used in a ``with`` statement; ``update`` is safe to call where nothing is drawn."""

    def __init__(self, total: int | None, description: str) -> None:
        self._bar: Any = None
        if total is not None and _on_terminal():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=description, file=sys.stderr, dynamic_ncols=True, leave=False)

    def update(self, n: int = 1, **metrics: float | int | str) -> None:
        """Advance by ``n`` and show ``metrics`` behind the bar; numbers are shortened to three digits."""
        if self._bar is None:
            return
        if metrics:
            shown = {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in metrics.items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(n)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def progress_bar(total: int | None, description: str) -> ProgressBar:
    """A bar over ``total`` units: ``with progress_bar(100, "train") as bar: bar.update(1, loss=0.2)``.

    Nothing is drawn where ``total`` is None.
    """
    return ProgressBar(total, description)


@overload
def progress(items: int, description: str) -> Iterator[int]: ...


@overload
def progress(items: Iterable[T], description: str) -> Iterator[T]: ...


def progress(items: Iterable[Any] | int, description: str) -> Iterator[Any]:
    """Iterate over ``items`` (or over ``range(items)``) behind a bar."""
    sequence: Iterable[Any] = range(items) if isinstance(items, int) else items
    with progress_bar(len(sequence) if isinstance(sequence, Sized) else None, description) as bar:
        for item in sequence:
            yield item
            bar.update()


def _on_terminal() -> bool:
    stream = sys.stderr
    return stream is not None and stream.isatty()

"""What the loading workers share: batches on demand, and the seconds they took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def serve(batches: Iterator[Any], finish: Callable[[Any], Any]) -> None:
    """Answer each number of batches on stdin with the seconds it took to load and ``finish`` them."""
    shape = [list(part.shape) for part in finish(next(batches))]
    print(json.dumps({"shapes": shape}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            finish(next(batches))
        print(time.perf_counter() - started, flush=True)


def endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader

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


def batches(dataset: Any, settings: dict[str, Any]) -> Iterator[Any]:
    """Of a peer's dataset, shuffled, epoch after epoch, by PyTorch's own loader."""
    import torch

    workers = settings["workers"]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=settings["batch_size"], shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from loader

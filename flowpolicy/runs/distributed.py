"""One or many processes: what changes between them, in one object."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flowpolicy.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; a single process is ``Processes()``."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files, evaluates and shows progress."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's part of a global batch."""
        part = batch_size // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the processes, in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first process's tensors to all."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, *values: float) -> list[list[float]]:
        """The ``values`` of every process, one row each, in the order of their ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.count == 1:
            return [mine.tolist()]
        if dist.get_backend() == "nccl":
            mine = mine.to("cuda")
        rows = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def total(self, value: float) -> float:
        """The sum of ``value`` over the processes."""
        return sum(row[0] for row in self.gather(value))

    def averaged(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean over the processes of each metric; all processes call this with the same names."""
        rows = self.gather(*metrics.values())
        return {
            name: sum(values) / self.count
            for name, values in zip(metrics, zip(*rows, strict=True), strict=True)
        }

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


_PATIENCE = datetime.timedelta(hours=24)
"""How long processes wait for one that evaluates, or simulates slowly."""


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The process group that ``torchrun`` describes in the environment; a single process without it.

    Inside another such block it is the same group: a job that pretrains and then fine-tunes makes one.

    Args:
        device: the setting; GPUs take one process each and NCCL, ``cpu`` gloo.

    Raises:
        ConfigError: more processes on this machine than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if dist.is_initialized():
        yield Processes(dist.get_rank(), count, local_rank)
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"There are more processes here than the {torch.cuda.device_count()} GPUs; start fewer, or "
                "add device=cpu."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), count, local_rank)
    finally:
        dist.destroy_process_group()

"""How far learning has come, as every saved model says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flowpolicy.ranges import Allowed, at_most
from flowpolicy.settings import Settings, require

BOUNDS = ("action_low", "action_high")
"""Tensors of a saved model: the bounds of the action space."""
_Count = Annotated[int, Allowed(lambda count: 0 <= count < 10**15, "a count")]


@dataclass(frozen=True)
class Progress(Settings, prefix="progress"):
    """How far training had come."""

    num_timesteps: _Count
    total_timesteps: _Count
    remaining: Annotated[float, at_most(1)]
    iteration: _Count
    updates: _Count
    return_scale: tuple[float, ...]
    seconds: dict[str, float]
    worker_restarts: _Count

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.return_scale
        is_scale = len(scale) >= 3 and scale[0] >= 0 and scale[2] >= 0
        require(is_scale, "progress.return_scale", scale, "the moments of returns")

"""Exponential moving average of the weights: what is evaluated and saved."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """An averaged copy of a network.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the average does not
    remember the initial weights.
    """

    def __init__(self, network: M, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self._averaged: list[Tensor] = list(self.network.parameters())
        self._live: list[Tensor] = list(network.parameters())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the live weights; ``updates`` is how often that has happened before."""
        weight = 1.0 - min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._averaged, self._live, weight)

"""An ensemble of small networks, computed as one: each layer is one matrix product for all members."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EnsembleLayer(nn.Module):
    """E linear maps side by side.

    Args:
        members: E.
        size: of the input.
        width: of the output.
        normalized: layer norm (each member's own) and ReLU after it.
    """

    def __init__(self, members: int, size: int, width: int, normalized: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, size, width))
        self.bias = nn.Parameter(torch.empty(members, 1, width))
        for parameter in (self.weight, self.bias):  # as torch.nn.Linear starts
            nn.init.uniform_(parameter, -1 / math.sqrt(size), 1 / math.sqrt(size))
        self.normalized = normalized
        if normalized:
            self.gain = nn.Parameter(torch.ones(members, 1, width))
            self.shift = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor, members: Tensor | None = None) -> Tensor:
        """``(n, B, width)`` of ``(B, size)``, the same for all, or ``(n, B, size)``; of ``members`` ``(n,)``
        alone where they are given.
        """

        def of(parameter: Tensor) -> Tensor:
            return parameter if members is None else parameter[members]

        weight = of(self.weight)
        x = torch.baddbmm(of(self.bias), x.expand(len(weight), *x.shape[-2:]), weight)
        if not self.normalized:
            return x
        # One kernel a member; and a third faster where the result may lie in the place of the input.
        parts = zip(x, of(self.gain)[:, 0], of(self.shift)[:, 0], strict=True)
        if torch.is_grad_enabled():
            return torch.stack([F.layer_norm(y, y.shape[-1:], *affine) for y, *affine in parts]).relu_()
        for y, *affine in parts:
            y.copy_(F.layer_norm(y, y.shape[-1:], *affine))
        return x.relu_()


class Ensemble(nn.Module):
    """E perceptrons with layer norm that see the same input and give a number each, 0 at first.

    Args:
        members: E.
        size: of the input.
        hidden: width of each hidden layer.
    """

    def __init__(self, members: int, size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.members = members
        sizes = [size, *hidden]
        layers = [EnsembleLayer(members, *pair, True) for pair in itertools.pairwise(sizes)]
        last = EnsembleLayer(members, sizes[-1], 1, False)
        nn.init.zeros_(last.weight)  # before it has learnt, no input is better than another
        nn.init.zeros_(last.bias)
        self.layers = nn.ModuleList([*layers, last])

    def forward(self, x: Tensor, members: Tensor | None = None) -> Tensor:
        """``(n, B)`` of ``(B, size)``, of all members or of ``members`` ``(n,)``."""
        for layer in self.layers:
            x = layer(x, members)
        return x.squeeze(-1)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply what every member gives by ``factor``."""
        last = self.layers[-1]
        assert isinstance(last, EnsembleLayer)
        last.weight.mul_(factor)
        last.bias.mul_(factor)

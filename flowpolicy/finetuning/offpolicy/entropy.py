"""SAC's temperature (Haarnoja et al. 2018): the weight of an actor's entropy, learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

START = 0.003


class Temperature(nn.Module):
    """alpha = exp(a), which rises while the entropy is below its aim and falls while it is above."""

    def __init__(self) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor(math.log(START)))

    def forward(self) -> Tensor:
        """alpha."""
        return self.log_value.exp()

    def step(self, optimizer: torch.optim.Optimizer, log_prob: Tensor, entropy: float) -> None:
        """One step, from log-densities ``(...)`` towards an ``entropy``, both in nats a number."""
        loss = -self.log_value * (log_prob + entropy).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

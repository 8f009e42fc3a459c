"""SAC's temperature (Haarnoja et al. 2018): the weight of an actor's entropy, learnt.

Here it weighs the log-density per number, so that it means the same for few and for many numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step of what the optimiser holds, and no gradient of anything else."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=[each for group in optimizer.param_groups for each in group["params"]])  # type: ignore[no-untyped-call]
    optimizer.step()


class Temperature(nn.Module):
    """alpha = exp(a), which rises while the entropy is below its aim and falls while it is above.

    Args:
        start: alpha at first.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        """alpha."""
        return self.log_value.exp()

    def step(self, optimizer: torch.optim.Optimizer, log_prob: Tensor, entropy: float) -> None:
        """One step, from log-densities ``(...)`` towards an ``entropy``, both in nats a number."""
        descend(optimizer, -self.log_value * (log_prob + entropy).mean())

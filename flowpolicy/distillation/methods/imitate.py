"""The teacher's chunks as demonstrations: an ordinary student of a teacher with a steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.distillation.method import Method
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Metrics


@dataclass(frozen=True, kw_only=True)
class Imitate(Method):
    """The objective that the teacher was pretrained with, on its chunks in place of demonstrated ones.

    The student's x_0 are its own, so that what chose among the teacher's, changed its chunks, or tuned it for
    one K is learnt, and is no part of the student: that is a flow for any K.
    """

    name: ClassVar[str] = "imitate"
    follows_noise: ClassVar[bool] = False

    @property
    def row_multiple(self) -> int:
        """The objective's."""
        return self.teacher.objective.row_multiple

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """The objective's."""
        return self.teacher.objective.draw(shape, generator, device)

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The objective's."""
        return self.teacher.objective.loss(network, batch, draws, teacher)

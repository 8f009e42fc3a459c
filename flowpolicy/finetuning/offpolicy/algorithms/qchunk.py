"""Q-chunking (Li, Zhou and Levine 2025): the best of N chunks of the flow by a critic of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.finetuning.offpolicy.algorithms.algorithm import FlowProposals
from flowpolicy.finetuning.offpolicy.networks import SteeredActor
from flowpolicy.finetuning.offpolicy.replay import Transitions


@dataclass(frozen=True)
class QChunk(FlowProposals):
    """Acts by argmax_i Q(o, c_i) over c_1 ... c_N ~ flow(o); V'(o') = max_i min_m Q'_m(o', c'_i)."""

    name: ClassVar[str] = "qchunk"

    def steering(self, members: int, hidden: tuple[int, ...]) -> dict[str, Any]:
        """See :class:`Algorithm`."""
        return {
            "name": "best_of", "proposals": self.proposals, "members": members, "hidden": list(hidden),
        }  # fmt: skip

    def act(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Algorithm`."""
        chunks, known = self.proposed(networks, observation, generator)
        return networks.steering.best(observation, chunks), known

    def next_values(
        self, networks: SteeredActor, batch: Transitions, members: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See the class."""
        values: Tensor = networks.extra["target"](batch.next_observation, batch.known["chunks"], members)
        return values.amin(0).amax(1)

"""The inputs and outputs of an update rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.flow.objective import Metrics
from flowpolicy.settings import Settings


@dataclass(frozen=True)
class Minibatch:
    """B chunks of an iteration, each with the whole chain that made it; normalised units.

    Attributes:
        observation: key -> ``(B, T_o, *shape)``.
        x: chains ``(B, K+1, T, A)``; without injected noise x_0 and x_1 alone, ``(B, 2, T, A)``.
        mean: of the transitions when they were sampled, ``(B, K, T, A)``.
        std: likewise; 0 without injected noise.
        mask: elements that count, ``(B, K, T, 1)``; see :func:`~flowpolicy.finetuning.chain.transition_mask`.
        advantage: ``(B,)``, normalised over the iteration.
        returns: targets of the critic, ``(B,)``.
        executed: the chunks as they were executed, within the bounds of the action space, ``(B, T, A)``; None
            where the chain's end is meant.
        bounds: least and largest value of an executed action, ``(2, A)``; None where it has none.
        kept: what the rule's :meth:`UpdateRule.prepare` keeps of each chunk, name -> ``(B, ...)``.
        group_size: G; each G rows in a row were played from one state, and stay together. 1 without groups.
    """

    observation: dict[str, Tensor]
    x: Tensor
    mean: Tensor
    std: Tensor
    mask: Tensor
    advantage: Tensor
    returns: Tensor
    executed: Tensor | None = None
    bounds: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    group_size: int = 1

    @property
    def chunk(self) -> Tensor:
        """x_1, the executed chunk ``(B, T, A)``."""
        return self.x[:, -1] if self.executed is None else self.executed

    @property
    def chunk_mask(self) -> Tensor:
        """1 at the actions of x_1 that were executed, ``(B, T, 1)``."""
        return self.mask[:, -1]

    def __len__(self) -> int:
        return len(self.x)

    def parts(self, rows_at_once: int) -> tuple[Tensor, ...]:
        """All rows in order, as many at once as are whole groups."""
        rows = torch.arange(len(self), device=self.x.device)
        return torch.split(rows, max(1, rows_at_once // self.group_size) * self.group_size)

    def shuffled(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """All rows, whole groups in a random order, in ``count`` minibatches of nearly one size."""
        order = torch.randperm(len(self) // self.group_size, generator=generator, device=self.x.device)
        within = torch.arange(self.group_size, device=self.x.device)
        parts = torch.tensor_split(order, count)
        return tuple((part[:, None] * self.group_size + within).flatten() for part in parts)

    def __getitem__(self, rows: Tensor) -> Minibatch:
        return replace(
            self,
            observation={key: value[rows] for key, value in self.observation.items()},
            kept={key: value[rows] for key, value in self.kept.items()},
            executed=None if self.executed is None else self.executed[rows],
            **{name: getattr(self, name)[rows] for name in _ROWS},
        )


_ROWS = ("x", "mean", "std", "mask", "advantage", "returns")


class UpdateRule(Settings, ABC, prefix="update"):
    """A policy loss on a minibatch.

    What is drawn is drawn in :meth:`prepare`, once for each chunk of an iteration, so that the loss is a
    function of the flow and the chunks alone: the same whichever chunks it is computed with, and comparable
    between the steps of the iteration.

    Attributes:
        name: as configurations say it.
    """

    name: ClassVar[str]

    @property
    def injects_noise(self) -> bool | float:
        """Chunks are sampled from the chain with its noise, or those of a share of the environments are.

        Without, they are the flow's own, and exploration is that of x_0.
        """
        return True

    @property
    def branches(self) -> bool:
        """Noise is injected in one transition of each chain, drawn among the K."""
        return False

    @property
    def offline(self) -> bool:
        """All chunks of a run are the pretrained policy's, and are learned from at its end."""
        return False

    @property
    def needs_groups(self) -> bool:
        """The rule compares the chunks of a group; without other advantages it gets ``group``."""
        return False

    @property
    def needs_reference(self) -> bool:
        """The rule looks at the pretrained flow."""
        return False

    def prepare(
        self, flow: NoisyFlow, data: Minibatch, reference: NoisyFlow | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What the rule keeps of each chunk until the next iteration, name -> ``(B, ...)``.

        Called without gradient before the first step of an iteration, with some of its chunks at a time:
        here ``flow`` is still the behaviour policy.

        Args:
            flow: the flow that will be trained.
            data: B chunks.
            reference: the pretrained flow, frozen; None unless the rule needs it.
            generator: source of everything random.
        """
        return {}

    @abstractmethod
    def loss(self, flow: NoisyFlow, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """Scalar loss and metrics, each a mean over the chunks, so that parts of a minibatch may be averaged.

        The metric ``train/kl`` says how far the policy has moved since :meth:`prepare`, by the rule's own
        measure (in nats a chunk where it can be had); beyond ``target_kl`` an iteration's updates stop.
        """


def shared_draws(data: Minibatch, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws for every chunk: numbers ``(B, n)``, one in each n-th of (0, 1), and x_0 ``(B, n, T, A)``.

    Chunks of a group share them.
    """
    chunk = data.chunk[:: data.group_size]
    uniform = torch.rand((len(chunk), count), generator=generator, device=chunk.device, dtype=chunk.dtype)
    shares = (uniform + torch.arange(count, device=chunk.device)) / count
    shape = (len(chunk), count, *chunk.shape[1:])
    x_0 = torch.randn(shape, generator=generator, device=chunk.device, dtype=chunk.dtype)
    return shares.repeat_interleave(data.group_size, 0), x_0.repeat_interleave(data.group_size, 0)

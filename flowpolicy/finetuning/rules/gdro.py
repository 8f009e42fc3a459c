"""Group-level direct reward optimisation (Wang et al. 2026, "GDRO") on action chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowpolicy.finetuning.rules.forward import ForwardRule, executed_sum
from flowpolicy.finetuning.rules.rule import Minibatch
from flowpolicy.flow.objective import Metrics
from flowpolicy.ranges import PositiveFloat


@dataclass(frozen=True)
class GDRO(ForwardRule):
    """The chunks of a group are told apart by the policy as their advantages tell them apart.

    With the implicit reward g_i = -b (|v - u_i|^2 - |v_old - u_i|^2), a mean over draws of (t, x_0) that the
    group shares,

        loss = -sum_i p_i log softmax(g)_i,   p = softmax(A / temperature),

    over the G chunks of a group. It is lowest where g is A / temperature but for a constant: where |v - u|^2
    stands for a negative log-likelihood, that is the policy tilted by exp(A / temperature). Nothing is
    sampled from the policy that learns, so that the chunks may be the pretrained policy's alone.

    Attributes:
        strength: b. 1 / (2 ``SPREAD``^2) makes implicit rewards nats, as ``train/kl`` is; the smaller, the
            farther v goes, over the more numbers a chunk has the more so.
        temperature: of the advantages, in standard deviations; the lower, the farther v goes.
        offline: learn from chunks of the pretrained policy, at the end of the run; else in every iteration.
    """

    name: ClassVar[str] = "gdro"
    needs_groups = True
    strength: PositiveFloat = 5.6
    temperature: PositiveFloat = 0.5
    offline: bool = True

    def policy_loss(self, velocity: Tensor, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """See the class."""
        old, new = (
            executed_sum((each - batch.kept["u"]) ** 2, batch).mean(1)
            for each in (batch.kept["old"], velocity)
        )
        implicit = (self.strength * (old - new)).view(-1, batch.group_size)
        advantage = batch.advantage.view(-1, batch.group_size)
        wanted = (advantage / self.temperature).softmax(1)
        loss = -(wanted * implicit.log_softmax(1)).sum(1).mean()
        agreement = (implicit.detach() * (advantage - advantage.mean(1, keepdim=True))).sum(1)
        return loss, {"train/agreement": (agreement > 0).to(loss.dtype).mean()}

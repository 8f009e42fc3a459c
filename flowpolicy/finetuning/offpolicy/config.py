"""Settings of off-policy fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from flowpolicy.finetuning.config import OnlineConfig
from flowpolicy.policy.steering import Widths
from flowpolicy.ranges import BelowOne, NonNegativeInt, PositiveFloat, PositiveInt, between, within
from flowpolicy.settings import Settings

MOST = 100_000_000


@dataclass(frozen=True)
class OffPolicySettings(Settings, prefix="offpolicy"):
    """Settings that all off-policy algorithms share.

    Attributes:
        learning_rate: of the critic, and of what an algorithm learns besides it.
        batch_size: chunks of an update.
        buffer_size: chunks of the replay.
        learning_starts: environment steps before the first update; in an environment the flow acts as it was
            pretrained until then.
        offline_updates: updates from the demonstrations alone, before anything is executed.
        train_freq: chunks of every environment between updates.
        utd: updates for each chunk that was executed.
        gamma: discount per environment step: a chunk of n steps discounts gamma^n.
        n_steps: chunks in a row that a target sums the rewards of, before the critic is asked.
        tau: share of the critic that its slow copy takes over in an update.
        members: of the critic's ensemble.
        target_members: of those, drawn at random, the least counts as a target.
        critic_hidden: widths of the critic.
        demonstration_share: of each batch, where there are demonstrations.
    """

    learning_rate: PositiveFloat = 3e-4
    batch_size: Annotated[int, between(2, 1_000_000)] = 256
    buffer_size: Annotated[int, between(1, MOST)] = 200_000
    learning_starts: NonNegativeInt = 2_000
    offline_updates: NonNegativeInt = 0
    train_freq: Annotated[int, between(1, 1_000_000)] = 8
    utd: Annotated[float, within("(0, 1000]")] = 1.0
    gamma: Annotated[float, within("(0, 1]")] = 0.99
    n_steps: Annotated[int, between(1, 1000)] = 5
    tau: Annotated[float, within("(0, 1]")] = 0.01
    members: Annotated[int, between(1, 100)] = 5
    target_members: PositiveInt = 2
    critic_hidden: Widths = (256, 256)
    demonstration_share: BelowOne = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "critic_hidden", tuple(self.critic_hidden))


@dataclass(frozen=True)
class OffPolicyConfig(OnlineConfig):
    """Everything an off-policy run depends on.

    Attributes:
        algorithm: the algorithm's ``name`` and its settings.
        offpolicy: what all algorithms share.
        demonstrations: store for a share of each batch; None takes the task's own, if there is one.
    """

    total_steps: PositiveInt = 200_000
    num_envs: PositiveInt = 8
    save_every: PositiveInt = 20
    algorithm: dict[str, Any] = field(default_factory=dict)
    offpolicy: OffPolicySettings = field(default_factory=OffPolicySettings)
    demonstrations: str | None = None

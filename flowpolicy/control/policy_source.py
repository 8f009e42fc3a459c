"""Where the policy of a control run comes from: a checkpoint, or a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from flowpolicy.acceleration.choosing.plan import DeploymentPlan
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.inference_hosts import Build
from flowpolicy.control.policy_inference import InferenceBuilder
from flowpolicy.control.robot import Robot
from flowpolicy.control.served import ServedPolicy
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.policy import FlowPolicy


class PolicySource(Protocol):
    """The policy of a run, and what samples its chunks."""

    @property
    def name(self) -> str:
        """Checkpoint or address."""

    @property
    def policy(self) -> ChunkPolicy | None:
        """None where it is known only once the robot is: see :meth:`adopt`."""

    @property
    def plan(self) -> DeploymentPlan | None:
        """That decides how it is sampled."""

    def adopt(self, robot: Robot) -> ChunkPolicy:
        """The policy, for a robot whose observations it takes as they are; called once, before the rest."""

    def builders(self) -> tuple[Build, Build | None]:
        """Of the inference, and of a faster one."""

    def watch(self, stop: Callable[[str], None]) -> None:
        """The loop begins; ``stop`` ends it, and says why."""

    def about(self) -> dict[str, Any]:
        """For the summary."""

    def close(self) -> None:
        """Let go of what is held."""


@dataclass(frozen=True)
class LoadedPolicy:
    """The policy of a checkpoint.

    Attributes:
        name: the checkpoint.
        policy: loaded.
        plan: see :class:`PolicySource`.
        plan_file: where it was read.
        sampler: how chunks are sampled.
        faster: likewise, to fill gaps.
        seed: of the noises.
    """

    name: str
    policy: FlowPolicy
    plan: DeploymentPlan | None
    plan_file: str | None
    sampler: DeployedSampler
    faster: DeployedSampler | None
    seed: int

    def adopt(self, robot: Robot) -> ChunkPolicy:
        """See :class:`PolicySource`."""
        return self.policy

    def builders(self) -> tuple[Build, Build | None]:
        """See :class:`PolicySource`."""
        fast = None if self.faster is None else InferenceBuilder(self.faster, self.seed + 1)
        return InferenceBuilder(self.sampler, self.seed), fast

    def watch(self, stop: Callable[[str], None]) -> None:
        """Nothing can fail that inference would not show."""

    def about(self) -> dict[str, Any]:
        """See :class:`PolicySource`."""
        return {
            "checkpoint": self.name, "sampling": self.sampler.filled(self.policy.sampling).content(),
            "plan": self.plan_file, "fast_steps": self.faster.num_steps if self.faster else None,
        }  # fmt: skip

    def close(self) -> None:
        """See :class:`PolicySource`."""


@dataclass(frozen=True)
class PolicyOfServer:
    """The policy of a server.

    Attributes:
        name: its address.
        served: the connection.
    """

    plan: ClassVar[None] = None

    name: str
    served: ServedPolicy

    @property
    def policy(self) -> ChunkPolicy | None:
        """See :class:`PolicySource`."""
        return self.served.policy

    def adopt(self, robot: Robot) -> ChunkPolicy:
        """See :class:`PolicySource`."""
        return self.served.policy or self.served.adopt(robot)

    def builders(self) -> tuple[Build, Build | None]:
        """See :class:`PolicySource`."""
        return self.served.builder(), None

    def watch(self, stop: Callable[[str], None]) -> None:
        """Nothing can fail that inference would not show."""

    def about(self) -> dict[str, Any]:
        """See :class:`PolicySource`."""
        return {"policy_server": self.name}

    def close(self) -> None:
        """See :class:`PolicySource`."""
        self.served.close()

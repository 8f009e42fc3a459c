"""A policy on a server in place of a checkpoint: what a control run needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from flowpolicy.control.inference_hosts import Build
from flowpolicy.control.robot import Robot
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.ranges import Allowed, PositiveFinite, PositiveInt
from flowpolicy.settings import Settings


@dataclass(frozen=True)
class PolicyServer(Settings, prefix="policy_server"):
    """Where the policy is served, in openpi's protocol.

    Attributes:
        url: ``ws://HOST:PORT``.
        token_file: file with the server's token; without it, the environment variable FLOWPOLICY_TOKEN.
        timeout_s: until an answer must have come.
        observations: for servers that do not describe their policy, as openpi's own: the key of a request ->
            the robot's observation, or a mapping of such; None sends the robot's own keys.
        prompt: instruction that is sent with every request.
        execute_horizon: T_e, for servers that do not say it; None takes half of a chunk.
    """

    url: Annotated[str, Allowed(bool, "an address, such as ws://127.0.0.1:8000")]
    token_file: str | None = None
    timeout_s: PositiveFinite = 5.0
    observations: dict[str, Any] | None = None
    prompt: str | None = None
    execute_horizon: PositiveInt | None = None


class ServedPolicy(Protocol):
    """A connection to a policy server, and a way to make more."""

    @property
    def policy(self) -> ChunkPolicy | None:
        """The policy; None where the server does not describe it and :meth:`adopt` was not called."""

    def adopt(self, robot: Robot) -> ChunkPolicy:
        """The policy, with the robot's observations and actions, and the horizon of a first chunk."""

    def builder(self) -> Build:
        """Connects once more, where chunks are sampled."""

    def close(self) -> None:
        """End the connection."""


Connect = Callable[[PolicyServer], ServedPolicy]

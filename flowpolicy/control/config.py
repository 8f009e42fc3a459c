"""Settings of a control loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flowpolicy.control.safety import SafetyConfig
from flowpolicy.ranges import BelowOne, PositiveFinite, PositiveInt, between
from flowpolicy.settings import Settings, require


@dataclass(frozen=True)
class ControlConfig(Settings, prefix="control"):
    """Settings of a control loop.

    Attributes:
        rate_hz: ticks a second, 1 to 1000; None takes the robot's own rate.
        fusion: ``switch``, ``ensemble`` or ``rtc``.
        execute_horizon: T_e, actions executed after which the next chunk is asked for; None: the policy's.
        max_delay: actions executed while a chunk is under way after which it counts as late; None: all that
            the chunk leaves, T - T_e.
        wait_share: share of a period that a tick waits for the chunk it has just asked for, where recent ones
            came that fast: such a chunk has no delay at all. 0 never waits.
        fast_lead: actions before they run out at which the faster sampler is asked.
        hang_timeout_s: after which a request counts as lost and its worker is replaced; None: a third of the
            watchdog's patience (``safety.miss_limit``) after the actions have run out.
        driver_timeout_s: after which a call of the robot that does not return counts as hanging.
        start_timeout_s: for the policy to be ready and its first chunk to come.
        telemetry_ticks: rows kept, the newest.
        priority: ask the system for real-time scheduling of the loop's thread, where it allows that.
        safety: limits of the commands.
    """

    rate_hz: Annotated[float, between(1, 1000)] | None = None
    fusion: str = "switch"
    execute_horizon: int | None = None
    max_delay: int | None = None
    wait_share: BelowOne = 0.3
    fast_lead: PositiveInt = 2
    hang_timeout_s: PositiveFinite | None = None
    driver_timeout_s: PositiveFinite = 0.5
    start_timeout_s: PositiveFinite = 60.0
    telemetry_ticks: PositiveInt = 200_000
    priority: bool = True
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def hang_timeout(self, period: float, left: int) -> float:
        """Seconds after which a request counts as lost.

        Args:
            period: seconds of a tick.
            left: ticks that the actions at hand last when a chunk is asked for, T - T_e.

        Raises:
            ConfigError: the watchdog would end the run before.
        """
        limit = self.safety.miss_limit
        if self.hang_timeout_s is None:
            return (left + limit / 3) * period  # so that two in a row end no run
        patience = (left + limit) * period
        require(
            self.hang_timeout_s < patience, "control.hang_timeout_s", self.hang_timeout_s,
            f"below {patience:.3g} s, when the watchdog (control.safety.miss_limit={limit}) ends the run of "
            "a policy that hangs",
        )  # fmt: skip
        return self.hang_timeout_s

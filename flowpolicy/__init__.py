"""Flow policies for robots: pretrain on demonstrations, fine-tune online, deploy in real time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowpolicy.errors import CheckpointError, ConfigError, DataError, FlowPolicyError, TaskError

if TYPE_CHECKING:
    from flowpolicy.policy import FlowPolicy
    from flowpolicy.policy.config import PolicyConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FlowPolicy",
    "FlowPolicyError",
    "PolicyConfig",
    "TaskError",
]


def __getattr__(name: str) -> Any:
    """The classes that need torch, imported when asked for: a command that prints its help waits for none."""
    if name == "FlowPolicy":
        from flowpolicy.policy import FlowPolicy

        return FlowPolicy
    if name == "PolicyConfig":
        from flowpolicy.policy.config import PolicyConfig

        return PolicyConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

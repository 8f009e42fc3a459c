"""Flow policies for robots: pretrain on demonstrations, practise online, deploy in real time."""

from flowpolicy.errors import CheckpointError, ConfigError, DataError, FlowPolicyError, TaskError
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy_config import PolicyConfig

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

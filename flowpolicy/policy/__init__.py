"""A policy: what it sees and does, its weights, and how it is kept on disk."""

from flowpolicy.policy.config import PolicyConfig
from flowpolicy.policy.flow_policy import FlowPolicy, Observations

__all__ = ["FlowPolicy", "Observations", "PolicyConfig"]

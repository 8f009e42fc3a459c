"""A policy: its observations and actions, its weights, and its files."""

from flowpolicy.policy.config import PolicyConfig
from flowpolicy.policy.flow_policy import FlowPolicy, Observations

__all__ = ["FlowPolicy", "Observations", "PolicyConfig"]

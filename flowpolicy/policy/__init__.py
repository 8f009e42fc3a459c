"""A policy: its observations and actions, its weights, and its files."""

from flowpolicy.policy.config import PolicyConfig
from flowpolicy.policy.flow_policy import FlowPolicy
from flowpolicy.policy.observations import Observations
from flowpolicy.policy.reward_guidance import RewardGuidance

__all__ = ["FlowPolicy", "Observations", "PolicyConfig", "RewardGuidance"]

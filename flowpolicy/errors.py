"""The errors a user can cause. Each carries one sentence: what is wrong, where, and how to fix it."""

from __future__ import annotations


class FlowPolicyError(ValueError):
    """Base of every error this package raises on purpose; scripts print its sentence without a traceback."""


DAMAGED_POLICY = (
    "The policy answered with NaN or infinity to a finite observation; its weights are damaged or its "
    "training diverged, so use an earlier checkpoint."
)
"""What is said of a policy whose chunk is not finite."""


class ConfigError(FlowPolicyError):
    """A setting outside its allowed range, or of an unknown name."""


class DataError(FlowPolicyError):
    """Demonstrations that are broken, incomplete, or of another shape than the task's."""


class CheckpointError(FlowPolicyError):
    """A checkpoint that is missing, damaged, of a newer format, or of another policy."""


class TaskError(FlowPolicyError):
    """An environment that cannot be made, or whose spaces do not fit the policy."""


class BackendError(ConfigError):
    """A sampler's backend needs a package, a compiler or a device that is not here."""

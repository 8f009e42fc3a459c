"""Observations as users and robots give them, to the tensors that a policy reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowpolicy.errors import FlowPolicyError
from flowpolicy.features.presence import completed
from flowpolicy.spec import PolicySpec

Observations = Mapping[str, Any] | Any  # key -> (B, T_o, *shape), or the single array of key "observation"


def checked_observations(
    spec: PolicySpec, observations: Observations, device: torch.device
) -> dict[str, Tensor]:
    """Observations in physical units as tensors on a device, key -> ``(B, T_o, *shape)``: float32, uint8 of
    an image, and int32 of a text, which may be given once for all steps, or all rows.

    Raises:
        FlowPolicyError: a missing key, a wrong shape, or values that are none of their kind.
    """
    if not isinstance(observations, Mapping):
        observations = {"observation": observations}
    observations = completed(spec.features, observations)
    given = {key: _tensor(spec, key, observations, device) for key in spec.features}
    batches = [
        len(values) for key, values in given.items() if values.ndim == 2 + len(spec.features[key].shape)
    ]
    checked, batch = {}, None
    for key, feature in spec.features.items():
        values = feature.over_history(given[key], max(batches, default=1), spec.obs_horizon)
        wanted = (spec.obs_horizon, *feature.shape)
        if tuple(values.shape[1:]) != wanted or (batch is not None and len(values) != batch):
            raise FlowPolicyError(
                f"Observation '{key}' has shape {tuple(values.shape)}; the policy takes "
                f"({batch if batch is not None else 'batch'}, {', '.join(map(str, wanted))})."
            )
        problem = feature.problem(values)
        if problem:
            raise FlowPolicyError(f"Observation '{key}' {problem}.")
        batch = len(values)
        checked[key] = values
    return checked


def _tensor(spec: PolicySpec, key: str, observations: Mapping[str, Any], device: torch.device) -> Tensor:
    if key not in observations:
        raise FlowPolicyError(f"The observation lacks '{key}'; the policy takes {', '.join(spec.features)}.")
    feature = spec.features[key]
    try:
        return feature.tensor(observations[key], device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FlowPolicyError(f"Observation '{key}' {feature.refusal(error)}.") from error

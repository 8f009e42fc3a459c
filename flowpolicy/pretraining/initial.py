"""Training that starts from the weights of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flowpolicy.errors import CheckpointError
from flowpolicy.policy import FlowPolicy, PolicyConfig
from flowpolicy.settings import shown


def start_from(start: FlowPolicy, policy: FlowPolicy, source: str) -> None:
    """Give ``policy`` the weights of ``start``, which was read from ``source``.

    Raises:
        CheckpointError: they are not of one shape; the first difference is named.
    """
    start.require_unsteered("Training")
    difference = next(_differences(start, policy), None)
    if difference is not None:
        what, theirs, ours = difference
        raise CheckpointError(
            f"init={source} is a policy with {what} {shown(theirs)}, and this run trains one with "
            f"{shown(ours)}; give the run the same settings, or leave out init=."
        )
    policy.network.load_state_dict(start.network.state_dict())


def _differences(start: FlowPolicy, policy: FlowPolicy) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = _described(policy.config), _described(start.config)
    yield from ((what, theirs[what], ours[what]) for what in ours if theirs[what] != ours[what])
    weights = [{k: tuple(v.shape) for k, v in each.network.state_dict().items()} for each in (start, policy)]
    for name in sorted(weights[0].keys() | weights[1].keys()):
        old, new = (each.get(name) for each in weights)
        if old != new:
            yield f"the weight '{name}' of shape", old, new


def _described(config: PolicyConfig) -> dict[str, Any]:
    """All that must agree and is better named than shapes of weights are."""
    return {
        "the objective": config.objective["name"],
        "the network": config.model.network,
        "the observations": {
            # Texts that a policy knows are for its warnings alone: it reads any.
            key: {name: value for name, value in feature.content().items() if name != "known"}
            for key, feature in config.observations.items()
        },
        "actions of size": config.action_dim,
        "learnt actions": dataclasses.asdict(config.actions),
        "an observation horizon of": config.obs_horizon,
        "an action horizon of": config.action_horizon,
    }

"""Which policy it is: what was measured or made for one is worth nothing for another."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from flowpolicy.features import features_of
from flowpolicy.policy.config import PolicyConfig


class _Module(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


class _Policy(_Module, Protocol):
    @property
    def config(self) -> PolicyConfig: ...


def fingerprint(policy: _Policy) -> str:
    """Hash of everything that decides a policy's actions: objective, sizes, weights and normalisers.

    What a checkpoint only says about itself (its task, where it comes from) is left out.
    """
    config = policy.config.content()
    for name in ("task", "metadata", "execute_horizon"):
        del config[name]
    # Spelt as format 1 did, so that schedules and plans made then stay valid; what is new appears where used.
    observations = policy.config.observations
    shapes = {key: feature.shape for key, feature in observations.items()}
    if observations == features_of(shapes):
        del config["observations"]
        config["observation_shapes"] = shapes
    tuned = config.pop("tuned") or {}
    config["tuned_num_steps"], config["tuned_solver"] = (
        tuned.pop("num_steps", None),
        tuned.pop("solver", "euler"),
    )
    if tuned:
        config["tuned"] = tuned
    if config["model"]["network"] == "transformer":
        del config["model"]["network"]
        if config["model"]["actions_per_token"] == 1:
            del config["model"]["actions_per_token"]
    vision = config["model"].get("vision", {})
    for name in ("jitter", "weights", "frozen"):  # of training alone
        vision.pop(name, None)
    return weights_hash(policy, json.dumps(config, sort_keys=True))


def weights_hash(module: _Module, about: str = "") -> str:
    """Hash of a module's state and of a text, 16 hexadecimal digits."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

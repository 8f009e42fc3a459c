"""An expert that is only weights: a small MLP actor read from a safetensors file, no pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from flowpolicy.errors import CheckpointError
from flowpolicy.files.reading import parse_json, stored_tensors
from flowpolicy.files.storage import atomic_file, save_tensors
from flowpolicy.settings import build, require

LOG_STD_RANGE = (-20.0, 2.0)  # the clamp that stable-baselines3 puts on a SAC actor's log standard deviation


@dataclass(frozen=True)
class ActorInfo:
    """What an actor file says about itself: where it came from and what it scores."""

    env_id: str
    algorithm: str
    steps: int
    seed: int
    return_mean: float
    return_std: float
    command: str
    versions: dict[str, str]


class ExpertActor:
    """A Gaussian MLP actor: ``observation (N, O) -> action (N, A)``.

    ``squash="tanh"`` is a SAC actor (state-dependent standard deviation, squashed sample);
    ``squash="clip"`` is a PPO actor (constant standard deviation, clipped sample). Observation
    statistics, where the algorithm normalised its input, and action bounds other than [-1, 1] travel with
    the weights.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], activation: str, squash: str, info: ActorInfo
    ) -> None:
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.activation = activation
        self.squash = squash
        self.info = info
        self._nonlinearity = {"relu": torch.relu, "tanh": torch.tanh}[activation]
        self._normalizes = bool(self.tensors["obs_mean"].any() or (self.tensors["obs_std"] != 1).any())
        size = len(self.tensors["mean.bias"])
        self._low = self.tensors.get("action_low", torch.full((size,), -1.0))
        self._high = self.tensors.get("action_high", torch.full((size,), 1.0))
        self._depth = sum(name.startswith("hidden") and name.endswith("weight") for name in tensors)

    def check(self) -> None:
        """Raise a ValueError where the tensors are no layers that follow each other, and a KeyError where one
        is missing.
        """
        size = len(self.tensors["obs_mean"])
        wanted: dict[str, tuple[int, ...]] = {"obs_mean": (size,), "obs_std": (size,)}
        for layer in range(self._depth):
            width = len(self.tensors[f"hidden{layer}.bias"])
            wanted |= {f"hidden{layer}.weight": (width, size), f"hidden{layer}.bias": (width,)}
            size = width
        actions = len(self._low)
        spread = {"log_std.weight": (actions, size), "log_std.bias": (actions,)}
        if "log_std" in self.tensors:
            spread = {"log_std": (actions,)}
        wanted |= {"mean.weight": (actions, size), "mean.bias": (actions,), **spread}
        bounds = {name: (actions,) for name in ("action_low", "action_high") if name in self.tensors}
        for name, shape in (wanted | bounds).items():
            if tuple(self.tensors[name].shape) != shape:
                raise ValueError(f"'{name}' is {tuple(self.tensors[name].shape)} and not {shape}")
        if not ((self.tensors["obs_std"] > 0).all() and (self._low <= self._high).all()):
            raise ValueError("a standard deviation that is not positive, or bounds the wrong way round")

    @torch.no_grad()
    def act(
        self, observation: np.ndarray, rng: np.random.Generator, *, deterministic: bool = False
    ) -> np.ndarray:
        """Actions ``(N, A)`` within bounds for observations ``(N, O)``; noise comes from ``rng`` alone."""
        hidden = torch.as_tensor(observation, dtype=torch.float32)
        hidden = (hidden - self.tensors["obs_mean"]) / self.tensors["obs_std"]
        if self._normalizes:  # the clip that VecNormalize applies
            hidden = hidden.clamp(-10.0, 10.0)
        for layer in range(self._depth):
            weight, bias = self.tensors[f"hidden{layer}.weight"], self.tensors[f"hidden{layer}.bias"]
            hidden = self._nonlinearity(nn.functional.linear(hidden, weight, bias))
        action = nn.functional.linear(hidden, self.tensors["mean.weight"], self.tensors["mean.bias"])
        if not deterministic:
            if "log_std.weight" in self.tensors:
                log_std = nn.functional.linear(
                    hidden, self.tensors["log_std.weight"], self.tensors["log_std.bias"]
                )
                log_std = log_std.clamp(*LOG_STD_RANGE)
            else:
                log_std = self.tensors["log_std"].expand_as(action)
            noise = torch.from_numpy(rng.standard_normal(tuple(action.shape), dtype=np.float32))
            action = action + log_std.exp() * noise
        if self.squash == "tanh":
            action = self._low + 0.5 * (torch.tanh(action) + 1.0) * (self._high - self._low)
        else:
            action = torch.minimum(torch.maximum(action, self._low), self._high)
        if not torch.isfinite(action).all():
            raise CheckpointError("The actor answered with NaN or infinity; its weights are damaged.")
        return np.asarray(action.numpy(), dtype=np.float32)

    def save(self, path: Path) -> None:
        """Write weights (half precision) and description to one safetensors file."""
        header = {
            "activation": self.activation,
            "squash": self.squash,
            "info": json.dumps(self.info.__dict__),
        }
        half = {
            name: (tensor if name.startswith(("obs_", "action_")) else tensor.half()).contiguous()
            for name, tensor in self.tensors.items()
        }
        with atomic_file(path) as temporary:
            save_tensors(half, temporary, metadata=header)

    @classmethod
    def load(cls, path: Path | str) -> ExpertActor:
        """Read an actor file.

        Raises:
            CheckpointError: a missing or damaged file, or one that holds no actor.
        """
        if not Path(path).exists():
            raise CheckpointError(f"There is no actor file {path}; train one with flowpolicy train-expert.")
        try:
            tensors = stored_tensors(Path(path)).read(unbounded=("action_low", "action_high"))
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
            about = build(ActorInfo, parse_json(header["info"].encode(), "its description"), "actor")
            require(header["squash"] in ("tanh", "clip"), "squash", header["squash"], "tanh or clip")
            actor = cls(tensors, header["activation"], header["squash"], about)
            actor.check()
            return actor
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged or holds no actor ({error}); copy it again or train another."
            ) from error


def actor_from_sb3(model: Any, observation_rms: Any, info: ActorInfo) -> ExpertActor:
    """Extract the actor of a stable-baselines3 PPO or SAC model.

    ``observation_rms`` is the running mean and variance of ``VecNormalize``, or None.
    """
    policy = model.policy
    size = int(np.prod(model.observation_space.shape))
    tensors: dict[str, torch.Tensor] = {"obs_mean": torch.zeros(size), "obs_std": torch.ones(size)}
    space = model.action_space
    if not (np.all(space.low == -1.0) and np.all(space.high == 1.0)):
        tensors["action_low"], tensors["action_high"] = (
            torch.as_tensor(space.low),
            torch.as_tensor(space.high),
        )
    if observation_rms is not None:
        tensors["obs_mean"] = torch.as_tensor(observation_rms.mean, dtype=torch.float32)
        tensors["obs_std"] = torch.as_tensor(np.sqrt(observation_rms.var + 1e-8), dtype=torch.float32)
    is_sac = hasattr(policy, "actor") and hasattr(policy.actor, "latent_pi")
    body = policy.actor.latent_pi if is_sac else policy.mlp_extractor.policy_net
    linears = [module for module in body if isinstance(module, nn.Linear)]
    for index, linear in enumerate(linears):
        tensors[f"hidden{index}.weight"] = linear.weight.detach().cpu().clone()
        tensors[f"hidden{index}.bias"] = linear.bias.detach().cpu().clone()
    mean = policy.actor.mu if is_sac else policy.action_net
    tensors["mean.weight"], tensors["mean.bias"] = mean.weight.detach().clone(), mean.bias.detach().clone()
    if is_sac:
        head = policy.actor.log_std
        tensors["log_std.weight"], tensors["log_std.bias"] = (
            head.weight.detach().clone(),
            head.bias.detach().clone(),
        )
    else:
        tensors["log_std"] = policy.log_std.detach().clone()
    activation = "tanh" if any(isinstance(module, nn.Tanh) for module in body) else "relu"
    return ExpertActor(tensors, activation, "tanh" if is_sac else "clip", info)

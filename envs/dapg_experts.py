"""Experts of the Adroit hand: the trained policies that DAPG's authors publish (Rajeswaran et al. 2018).

    python scripts/collect_demos.py env=adroit_hammer env.scripted.settings.policy=hammer-v0.pickle episodes=5

The files are ``dapg/policies/*.pickle`` of https://github.com/aravindr93/hand_dapg. Each is a pickle of a
small perceptron. Only its numbers are read: whatever else a file asks for is an object that does nothing.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.data.importers.restricted_pickle import check_memo
from flowpolicy.errors import ConfigError, DataError

_LARGEST = 2**20  # bytes of a file; the published ones have 40 to 80 KB
_SCALES = ("in_shift", "in_scale", "out_shift", "out_scale")


class DapgExpert:
    """The mean action of a published policy.

    Args:
        policy: its file, for the task that it was trained for; without one no episode can be played.

    Raises:
        DataError: the file is not one of those.
    """

    def __init__(self, policy: str | None = None) -> None:
        self.path = None if policy is None else Path(policy)
        if self.path is not None:
            self.layers, self.scales = _read(self.path)

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """There is one way; everything follows from the environment's own start."""
        if self.path is None:
            raise ConfigError(
                "The task is demonstrated by a policy that DAPG's authors publish; give its file as "
                "env.scripted.settings.policy=FILE, from dapg/policies of https://github.com/aravindr93/hand_dapg."
            )
        size, wanted = _sizes(env), (self.layers[0][0].shape[1], self.layers[-1][0].shape[0])
        if size != wanted:
            raise DataError(
                f"{self.path} is a policy of {wanted[0]} observed numbers and {wanted[1]} actions, and the "
                f"task has {size[0]} and {size[1]}; take the file of this task."
            )
        return "dapg"

    def act(self, env: gym.Env[Any, Any], observation: Any) -> NDArray[np.float64]:
        """Action ``(A,)`` in the hand's own units, -1 to 1; not clipped."""
        scales = self.scales
        x = (observation["observation"] - scales["in_shift"]) / (scales["in_scale"] + 1e-8)
        for weight, bias in self.layers[:-1]:
            x = np.tanh(weight @ x + bias)
        weight, bias = self.layers[-1]
        action: NDArray[np.float64] = (weight @ x + bias) * scales["out_scale"] + scales["out_shift"]
        return action


def _sizes(env: gym.Env[Any, Any]) -> tuple[int, int]:
    observation: Any = env.observation_space
    action: Any = env.action_space
    return observation["observation"].shape[0], action.shape[0]


Layers = list[tuple[NDArray[np.float64], NDArray[np.float64]]]


def _read(path: Path) -> tuple[Layers, dict[str, NDArray[np.float64]]]:
    """Weights ``(out, in)`` and biases ``(out,)`` of the layers, and shifts and scales."""
    if not path.is_file():
        raise DataError(
            f"There is no file {path}; give a policy of hand_dapg as env.scripted.settings.policy=FILE."
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        check_memo(content)
        network = _Unpickler(io.BytesIO(content), encoding="latin1").load().state["model"].state
        parts = network["_modules"]["fc_layers"].state["_modules"].values()
        numbers = [part.state["_parameters"] for part in parts]
        layers = [(_finite(each["weight"]), _finite(each["bias"])) for each in numbers]
        scales = {name: _finite(network[name]) for name in _SCALES}
        _check(layers, scales)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{path} is no policy of hand_dapg ({error}); take one of its dapg/policies."
        ) from error
    return layers, scales


def _finite(values: Any) -> NDArray[np.float64]:
    if not isinstance(values, np.ndarray) or not np.isfinite(values).all():
        raise ValueError("its numbers are missing or not finite")
    return values


def _check(layers: list[Any], scales: dict[str, NDArray[np.float64]]) -> None:
    sizes = [layers[0][0].shape[-1], *(bias.shape[0] for _, bias in layers)]
    fit = [
        weight.shape == (after, before)
        for (weight, _), (before, after) in zip(layers, pairwise(sizes), strict=True)
    ]
    ends = {"in": sizes[0], "out": sizes[-1]}
    if not all(fit) or any(array.shape != (ends[name.split("_")[0]],) for name, array in scales.items()):
        raise ValueError("its layers do not fit each other")


class _Inert:
    """Whatever a file asks for: it keeps the state that it is given and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _storage(content: Any) -> NDArray[np.float64]:
    """Numbers of a stored tensor; PyTorch's own reader for weights alone runs no code."""
    if content[:2] == b"PK":
        raise ValueError("its numbers are zipped")  # of any size, once unpacked
    stored = torch.load(io.BytesIO(content), weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about storages with a type, which the files hold
        return np.asarray(stored.tolist(), np.float64)


def _tensor(
    stored: NDArray[np.float64], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> NDArray[np.float64]:
    numbers = stored[offset : offset + int(np.prod(shape))].reshape(shape)
    if numbers.strides != tuple(stride * numbers.itemsize for stride in strides):
        raise ValueError("its numbers are in another order")
    return numbers


def _parameter(tensor: NDArray[np.float64], *_: Any) -> NDArray[np.float64]:
    return tensor


_READ = {
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _READ.get((module, name), _Inert)

"""Environments in one form: observations by name in float32 or integers, actions within their bounds."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from flowpolicy.errors import TaskError
from flowpolicy.texts import LONGEST_TEXT, text_bytes

Fields = dict[str, tuple[tuple[int, ...], type[np.generic]]]
"""Key -> shape and dtype (float32 or an integer) of one observation."""


class StandardEnvironment(gymnasium.Wrapper[Any, Any, Any, Any]):  # type: ignore[misc]
    """An environment as evaluation, fine-tuning, robots and collection want it.

    Observations are a Dict: a Box becomes the key ``observation``, what is no Box is left out. Floats are
    float32, and integers stay, which to some kinds of observation are pixels or millimetres. An action is
    held within the bounds of the action space and comes in its dtype.

    Args:
        env: with observations that are a Box or a Dict, and actions that are a flat Box.
        label: what messages call it.
        texts: further observations, the same at each step, in place of the environment's own of these names.

    Raises:
        TaskError: actions of another kind; later, an observation that is not as its space says.
    """

    def __init__(
        self, env: Any, label: str = "The environment", texts: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(env)
        self._texts = {key: text_bytes(text) for key, text in (texts or {}).items()}
        action = check_actions(env.action_space, label)
        self._low, self._high, self._action_dtype = action.low, action.high, action.dtype
        boxes = {**boxes_of(env.observation_space), **dict.fromkeys(self._texts, _TEXT)}
        self.fields = fields_of(boxes)
        self._is_dict = isinstance(env.observation_space, spaces.Dict)
        with np.errstate(over="ignore"):
            self.observation_space = spaces.Dict({
                key: spaces.Box(boxes[key].low.astype(dtype), boxes[key].high.astype(dtype), shape, dtype)
                for key, (shape, dtype) in self.fields.items()
            })  # fmt: skip

    def keeping(self, keys: Collection[str]) -> StandardEnvironment:
        """The same environment with the observations ``keys`` alone: what nobody looks at costs nothing.

        Others that hold this object, as a vectorised environment does, still see all that its space promises.
        """
        kept = copy.copy(self)
        kept.fields = {key: self.fields[key] for key in keys}
        return kept

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """First observation, key -> ``(*shape)``, and info."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._read(observation), info

    def step(self, action: Any) -> Any:
        """Observation, reward, terminated, truncated, info."""
        return self.step_bounded(self.bounded(action))

    def bounded(self, actions: Any) -> NDArray[Any]:
        """Actions ``(..., A)`` within the bounds and in the dtype of the action space; NaN stays NaN."""
        bounded = np.minimum(np.maximum(actions, self._low), self._high)
        return np.asarray(bounded, self._action_dtype)

    def step_bounded(self, action: NDArray[Any]) -> Any:
        """:meth:`step` with an action of :meth:`bounded`: a caller with many actions bounds them at once."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._read(observation), reward, terminated, truncated, info

    def _read(self, observation: Any) -> dict[str, NDArray[Any]]:
        named = observation if self._is_dict else {"observation": observation}
        return read_observation({**named, **self._texts} if self._texts else named, self.fields)


def standard(
    env: Any, label: str = "The environment", texts: Mapping[str, str] | None = None
) -> StandardEnvironment:
    """``env`` in the form of :class:`StandardEnvironment`; one that is in it already stays as it is."""
    if isinstance(env, StandardEnvironment) and not texts:
        return env
    return StandardEnvironment(env, label, texts)


def check_actions(space: Any, label: str = "The environment") -> spaces.Box:
    """The action space, refused (TaskError) unless it is a flat Box."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise TaskError(f"{label} takes actions {space}; wrap it so that they are a flat Box.")
    return space


def boxes_of(space: Any) -> dict[str, spaces.Box]:
    """The arrays among an environment's observations, by name; a text is one of bytes."""
    offered = space.spaces if isinstance(space, spaces.Dict) else {"observation": space}
    boxes = {key: _TEXT if isinstance(box, spaces.Text) else box for key, box in offered.items()}
    return {key: box for key, box in boxes.items() if isinstance(box, spaces.Box)}


_TEXT = spaces.Box(0, 255, (LONGEST_TEXT,), np.uint8)


def fields_of(boxes: Mapping[str, spaces.Box]) -> Fields:
    """How observations of these spaces are kept."""
    return {
        key: (tuple(box.shape), box.dtype.type if box.dtype.kind in "iu" else np.float32)
        for key, box in boxes.items()
    }


def read_observation(
    observation: Mapping[str, Any], fields: Fields, batch: tuple[int, ...] = ()
) -> dict[str, NDArray[Any]]:
    """An observation, or a batch of them, as ``fields`` say; other keys are left.

    Raises:
        TaskError: an array of another shape than the space has, or floats where it has integers.
    """
    found = {}
    for key, (shape, dtype) in fields.items():
        given = np.asarray(observation[key])
        if given.dtype.kind == "U" and shape == _TEXT.shape:
            texts = [text_bytes(text) for text in given.ravel().tolist()]
            given = np.reshape(texts, (*given.shape, LONGEST_TEXT))
        if given.dtype.kind == "f" and dtype is not np.float32:
            raise TaskError(
                f"The environment gave '{key}' of {given.dtype} where its observation space says "
                f"{np.dtype(dtype)}; fix one or the other."
            )
        found[key] = array = np.asarray(given, dtype)
        if array.shape != batch + shape:
            raise TaskError(
                f"The environment gave '{key}' of shape {array.shape[len(batch) :]} where its observation "
                f"space says {shape}; fix the one or the other."
            )
    return found

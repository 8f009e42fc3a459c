"""The spaces of an environment, and the arrays of histories and chunks that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError, TaskError
from flowpolicy.settings import require

Histories = dict[str, NDArray[Any]]
"""Key -> ``(N, T_o, *shape)``: the last T_o observations of N environments, oldest first."""


class ChunkSpaces:
    """The spaces of one environment, checked, and what histories and actions look like because of them.

    Args:
        observation_space: a Box or a Dict of Boxes.
        action_space: a flat Box.
        keys: observation keys to keep; a Box has the one key ``observation``.
        obs_horizon: T_o.

    Raises:
        TaskError: another kind of space, or no such key.
    """

    def __init__(
        self, observation_space: Any, action_space: Any, keys: Sequence[str], obs_horizon: int
    ) -> None:
        require(obs_horizon >= 1, "obs_horizon", obs_horizon, "at least 1")
        if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
            raise TaskError(
                f"The environment takes actions {action_space}; wrap it so that they are a flat Box."
            )
        self.obs_horizon = obs_horizon
        self.action_space = action_space
        self._is_dict = isinstance(observation_space, spaces.Dict)
        boxes = self._boxes(observation_space)
        for key in keys:
            if not isinstance(boxes.get(key), spaces.Box):
                raise TaskError(
                    f"The environment has no observation '{key}' that is an array "
                    f"(it has {', '.join(sorted(boxes))}); choose the task that the policy was trained for."
                )
        self.shapes = {key: tuple(boxes[key].shape) for key in keys}
        self.dtypes = {key: np.float32 if boxes[key].dtype.kind == "f" else boxes[key].dtype for key in keys}

    def check_equal(self, observation_space: Any, action_space: Any) -> None:
        """Refuse (TaskError) the spaces of another environment unless they are these."""
        boxes = self._boxes(observation_space)
        same = all(key in boxes and tuple(boxes[key].shape) == shape for key, shape in self.shapes.items())
        if not same or action_space != self.action_space:
            raise TaskError(
                "The environments differ in their observation shapes or action spaces; "
                "give environments of one task."
            )

    def bounded(self, chunks: NDArray[Any], num_envs: int, first_number: int = 0) -> NDArray[Any]:
        """``chunks`` clipped to the action space, a copy of its dtype.

        Raises:
            FlowPolicyError: a wrong shape, NaN or infinity.
        """
        chunks = np.asarray(chunks)
        expected = (num_envs, chunks.shape[1] if chunks.ndim == 3 else "T_e", *self.action_space.shape)
        if chunks.shape != expected or 0 in chunks.shape:
            raise FlowPolicyError(
                f"The chunks have the shape {chunks.shape}; {num_envs} environments need "
                f"({num_envs}, T_e, {self.action_space.shape[0]}) with T_e >= 1."
            )
        if not np.isfinite(chunks).all():
            row = first_number + first_bad_row(chunks)
            raise FlowPolicyError(
                f"The chunk for environment {row} has an action with NaN or infinity; the policy diverged, "
                "so go back to an earlier checkpoint and lower the learning rate."
            )
        bounded = np.clip(chunks, self.action_space.low, self.action_space.high)
        return np.asarray(bounded, dtype=self.action_space.dtype)

    def tape(self, num_envs: int, steps: int) -> Histories:
        """Zeros for the history of every environment and ``steps`` observations after it."""
        return {
            key: np.zeros((num_envs, self.obs_horizon + steps, *shape), dtype=self.dtypes[key])
            for key, shape in self.shapes.items()
        }

    def named(self, tape: Histories) -> list[tuple[str | None, NDArray[Any]]]:
        """The arrays of ``tape``, each with its key in an observation (None: that is the array itself)."""
        return [(key if self._is_dict else None, rows) for key, rows in tape.items()]

    def read(self, observation: Any, batch: tuple[int, ...] = ()) -> Histories:
        """The kept keys of one observation (or of a batch of them), in the dtypes of histories.

        Raises:
            TaskError: an array of another shape than the space has.
        """
        values = observation if self._is_dict else {"observation": observation}
        found = {}
        for key, shape in self.shapes.items():
            found[key] = np.asarray(values[key], dtype=self.dtypes[key])
            if found[key].shape != (*batch, *shape):
                raise TaskError(
                    f"The environment gave '{key}' of shape {found[key].shape[len(batch) :]} where its "
                    f"observation space says {shape}; mend the one or the other."
                )
        return found

    @staticmethod
    def _boxes(space: Any) -> dict[str, Any]:
        return dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}


def copied(histories: Histories) -> Histories:
    """A copy that shares no array."""
    return {key: array.copy() for key, array in histories.items()}


def check_finite(rows: NDArray[Any], what: str, first_number: int = 0) -> None:
    """Refuse (FlowPolicyError) NaN or infinity in ``rows``, ``(N, ...)``, naming the environment."""
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise FlowPolicyError(
            f"Environment {first_number + first_bad_row(rows)} gave {what} with NaN or infinity; check the "
            "simulator (an unstable contact or a too large action does this)."
        )


def first_bad_row(rows: NDArray[Any]) -> int:
    """Index of the first row with NaN or infinity."""
    return int(np.argmin(np.isfinite(rows).reshape(len(rows), -1).all(axis=1)))

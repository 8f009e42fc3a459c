"""The last T_o observations of N slots (environments, robots), the input of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError

if TYPE_CHECKING:  # the workers of environments keep histories without torch
    from flowpolicy.features import Feature

Histories = dict[str, NDArray[Any]]
"""Key -> ``(N, T_o, *shape)``, oldest first."""


class HistoryBuffer:
    """Keeps histories; the first observation of an episode fills the whole of its slot's.

    Args:
        fields: key -> shape and dtype of one observation; other keys are not kept.
        num_slots: N.
        obs_horizon: T_o.

    Attributes:
        arrays: key -> ``(N, T_o, *shape)``, the buffer itself; copy it to keep it.
    """

    def __init__(
        self, fields: Mapping[str, tuple[tuple[int, ...], Any]], num_slots: int, obs_horizon: int
    ) -> None:
        self.num_slots, self.obs_horizon = num_slots, obs_horizon
        self.arrays: Histories = {
            key: np.zeros((num_slots, obs_horizon, *shape), dtype) for key, (shape, dtype) in fields.items()
        }
        self._fresh = np.ones(num_slots, dtype=bool)
        self._restarted = True  # whether any slot is fresh
        self._features: Mapping[str, Feature] = {}
        self._may_lack = False

    @classmethod
    def of_features(cls, features: Mapping[str, Feature], num_slots: int, obs_horizon: int) -> HistoryBuffer:
        """A buffer of a policy's observations, which brings what it takes into the form of each kind."""
        fields = {key: (feature.shape, feature.dtype) for key, feature in features.items()}
        buffer = cls(fields, num_slots, obs_horizon)
        buffer._features = features
        buffer._may_lack = any(feature.name == "presence" for feature in features.values())
        return buffer

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> HistoryBuffer:
        """A buffer that goes on from histories, key -> ``(N, T_o, *shape)``, of which it takes a copy."""
        fields = {key: (array.shape[2:], array.dtype) for key, array in arrays.items()}
        num_slots, obs_horizon = next(iter(arrays.values())).shape[:2]
        buffer = cls(fields, num_slots, obs_horizon)
        buffer.put(arrays)
        return buffer

    def put(self, histories: Mapping[str, NDArray[Any]], slots: Any = slice(None)) -> None:
        """Go on from ``histories``, key -> ``(n, T_o, *shape)``, in ``slots``."""
        for key, array in histories.items():
            self.arrays[key][slots] = array
        self._fresh[slots] = False
        self._restarted = bool(self._fresh.any())

    def restart(self, slots: Any = slice(None)) -> None:
        """An episode begins in ``slots``: their next observation fills the history."""
        self._fresh[slots] = True
        self._restarted = True

    def add(self, observation: Mapping[str, NDArray[Any]], slots: Any = slice(None)) -> None:
        """Take the newest observation of each of ``slots``, key -> ``(n, *shape)``; other keys are left.

        Raises:
            FlowPolicyError: a key is missing, or of a type that its kind refuses; then nothing is taken.
        """
        observation = self._completed(observation)
        read = {key: self._read(key, observation) for key in self.arrays}
        fresh = self._fresh[slots] if self._restarted else None
        any_fresh = fresh is not None and np.count_nonzero(fresh)
        for key, history in self.arrays.items():
            rows = read[key]
            kept = history[slots]  # itself where slots is a slice, else a copy
            if self.obs_horizon > 1:
                kept[:, :-1] = kept[:, 1:]
            kept[:, -1] = rows
            if any_fresh:
                kept[fresh] = rows[fresh][:, None]
            if kept.base is not history:
                history[slots] = kept
        if any_fresh:
            self._fresh[slots] = False
            self._restarted = bool(self._fresh.any())

    def _completed(self, observation: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        if not self._may_lack:
            return observation
        from flowpolicy.features.presence import completed

        return completed(self._features, observation)

    def _read(self, key: str, observation: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        if key not in observation:
            raise FlowPolicyError(
                f"The policy needs the observation '{key}' and got {', '.join(sorted(observation))}."
            )
        feature = self._features.get(key)
        if feature is None:
            return observation[key]
        rows = feature.array(observation[key])
        if rows.dtype != feature.dtype and (problem := feature.type_problem(rows.dtype)):
            raise FlowPolicyError(f"Observation '{key}' {problem}.")  # numpy would cast it in silence
        return rows

    def copy(self, slots: Any = slice(None)) -> Histories:
        """A copy of the histories of ``slots``."""
        return {key: np.array(array[slots]) for key, array in self.arrays.items()}

    def tape(self, steps: int) -> Histories:
        """The histories with room for ``steps`` observations after them, key -> ``(N, T_o + steps, *shape)``.

        After observations were written there, :meth:`wind` advances the buffer.
        """
        tape = {}
        for key, array in self.arrays.items():
            tape[key] = np.zeros((self.num_slots, self.obs_horizon + steps, *array.shape[2:]), array.dtype)
            tape[key][:, : self.obs_horizon] = array
        return tape

    def wind(self, tape: Histories, steps: NDArray[np.int64]) -> None:
        """Take the history that each slot has after ``steps``, ``(N,)``, further observations on a tape."""
        window = steps[:, None] + np.arange(self.obs_horizon)
        rows = np.arange(self.num_slots)[:, None]
        for key, array in self.arrays.items():
            array[:] = tape[key][rows, window]

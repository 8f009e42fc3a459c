"""Receding-horizon execution: from one observation per step to one action per step, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.errors import DAMAGED_POLICY, FlowPolicyError
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.settings import require
from flowpolicy.spec import PolicySpec


class ChunkPolicy(Protocol):
    """What execution and evaluation need of a policy; ``FlowPolicy`` is one."""

    @property
    def spec(self) -> PolicySpec:
        """Its observations and actions."""

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""

    def act(self, observations: Any, /, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, T_o, *shape) per key -> (B, T, A), physical units; keywords num_steps, solver, noise."""

    def nfe(self, *args: Any, **kwargs: Any) -> int:
        """Network evaluations per chunk; keywords num_steps, solver."""


class RecedingHorizon:
    """Runs one policy in several slots (environments, robots) at once.

    Each slot keeps the last T_o observations and the actions left of its chunk. A slot whose chunk is
    used up gets a new chunk; all such slots of one call share one batch. The first observation of an
    episode fills the whole history.

    The noise x_0 of a slot comes from that slot's own generator, drawn on the CPU. An episode therefore
    gets the same noise whatever runs beside it, and two policies given the same seeds are paired.

    Args:
        policy: the policy to run.
        num_slots: how many run side by side.
        execute_horizon: actions executed per chunk, 1 <= T_e <= T.
        num_steps: integration steps K; None takes the policy's own.
        solver: name of the ODE solver; None takes the policy's own.
        zero_noise: start every chunk at x_0 = 0 instead of a draw from N(0, I).
        act_options: further keyword arguments of ``policy.act``.

    Attributes:
        chunks: chunks sampled since construction.
        inference_seconds: wall time spent sampling them.

    Raises:
        ConfigError: when ``execute_horizon`` or ``num_slots`` is out of range.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        num_slots: int,
        execute_horizon: int,
        *,
        num_steps: int | None = None,
        solver: str | None = None,
        zero_noise: bool = False,
        act_options: Mapping[str, Any] | None = None,
    ) -> None:
        require(num_slots >= 1, "num_slots", num_slots, "at least 1")
        longest = policy.spec.action_horizon
        allowed = f"between 1 and the policy's action horizon {longest}"
        require(1 <= execute_horizon <= longest, "execute_horizon", execute_horizon, allowed)
        self.policy = policy
        self.num_slots = num_slots
        self.execute_horizon = execute_horizon
        self.zero_noise = zero_noise
        self.chunks = 0
        self.inference_seconds = 0.0
        self._options = {"num_steps": num_steps, "solver": solver, **(act_options or {})}
        self._history = HistoryBuffer.of_features(policy.spec.features, num_slots, policy.spec.obs_horizon)
        self._generators: list[torch.Generator | None] = [None] * num_slots
        self._sampled = np.zeros((num_slots, execute_horizon, policy.spec.action_dim), dtype=np.float32)
        self._used = np.full(num_slots, execute_horizon)

    def reset(self, slot: int, generator: torch.Generator | int) -> None:
        """Start an episode in ``slot``: forget its history and its chunk.

        Args:
            slot: index below ``num_slots``.
            generator: source of the episode's noise (on the CPU), or the seed of one.
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        self._generators[slot] = generator
        self._history.restart(slot)
        self._used[slot] = self.execute_horizon

    def actions(self, observations: Mapping[str, NDArray[Any]], slots: Sequence[int]) -> NDArray[np.float32]:
        """The next action of each of ``slots``.

        Args:
            observations: key -> (n, *shape), row i belonging to ``slots[i]``, physical units.
            slots: n different slot indices.

        Returns:
            (n, A) float32, physical units.

        Raises:
            FlowPolicyError: when a slot was never reset, an observation is of a type that its kind
                refuses, or the policy answers with NaN or infinity.
        """
        index = np.asarray(slots, dtype=np.int64)
        self._history.add(observations, index)
        empty = index[self._used[index] >= self.execute_horizon]
        if empty.size:
            self._sample(empty)
        actions: NDArray[np.float32] = self._sampled[index, self._used[index]]
        self._used[index] += 1
        return actions

    def _sample(self, index: NDArray[np.int64]) -> None:
        noise = torch.stack([self._noise(int(slot)) for slot in index]).to(self.policy.device)
        batch = self._history.copy(index)
        started = time.perf_counter()
        with torch.no_grad():
            chunk = self.policy.act(batch, noise=noise, **self._options)
        sampled = chunk[:, : self.execute_horizon].to("cpu", torch.float32).numpy()
        self.inference_seconds += time.perf_counter() - started
        self.chunks += len(index)
        if not np.isfinite(sampled).all():
            healthy = all(np.isfinite(item).all() for item in batch.values())
            raise FlowPolicyError(
                DAMAGED_POLICY
                if healthy
                else "The environment gave an observation with NaN or infinity, so no action follows; "
                "check the simulator (an unstable contact or a too large action does this)."
            )
        self._sampled[index] = sampled
        self._used[index] = 0

    def _noise(self, slot: int) -> torch.Tensor:
        generator = self._generators[slot]
        if generator is None:
            raise FlowPolicyError(f"Slot {slot} has no episode yet; call reset({slot}, seed) first.")
        shape = self.policy.spec.noise_shape
        drawn = torch.randn(shape, generator=generator)
        return torch.zeros(shape) if self.zero_noise else drawn

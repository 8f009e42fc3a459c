"""Environments that execute whole action chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChunkStep:
    """What N environments answered to N chunks of at most T_e actions.

    Attributes:
        observation: key -> ``(N, T_o, *shape)``, what the next chunk is planned from, oldest first; of the
            new episode where one ended.
        final_observation: the same, but of the old episode's true end where one ended.
        rewards: ``(N, T_e)`` per environment step, 0 after the last executed one.
        executed: ``(N,)`` environment steps executed.
        terminated: ``(N,)``, the episode ended in a terminal state.
        truncated: ``(N,)``, it was ended by a time limit; never both.
        success: ``(N,)``, the environment said so at any step of the chunk.
        restarted: ``(N,)``, the environment's process died in this call and was replaced.
    """

    observation: dict[str, NDArray[Any]]
    final_observation: dict[str, NDArray[Any]]
    rewards: NDArray[np.float32]
    executed: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    restarted: NDArray[np.bool_]

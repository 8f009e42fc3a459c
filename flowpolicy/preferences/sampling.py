"""Batches of decisions, two by two: of the segment that was preferred, and of the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.data.sampling import Batch, ChunkSampler, as_tensors, shuffled_index
from flowpolicy.errors import DataError
from flowpolicy.policy import FlowPolicy
from flowpolicy.preferences.pairs import CHUNK, Pairs
from flowpolicy.pretraining.stores import normalized


class PreferenceSampler(ChunkSampler):
    """Rows 2i and 2i + 1 of a batch are decisions of one pair: the preferred segment's, then the other's.

    An epoch meets every decision of every pair, those of the shorter segment several times. ``action`` is the
    whole chunk that the policy decided on, ``mask`` what was executed of it, ``reward`` that of the segment.

    Args:
        policy: gives the normalisers and the horizons.
        pairs: the segments.
        rewards: ``(pairs, 2)``; a pair of equal ones, or with NaN, is left out.
        chosen: numbers of the pairs to draw from.

    Raises:
        DataError: no pair is left.
    """

    def __init__(
        self, policy: FlowPolicy, pairs: Pairs, rewards: NDArray[np.float64], chosen: Iterable[int]
    ) -> None:
        demos, device = pairs.demos, policy.device
        observation, action, _ = normalized(policy, demos, None)
        # Of all steps: the window of a step is its number.
        super().__init__(observation, action, demos.episode_ends, policy.spec.obs_horizon, 1)
        rows: list[NDArray[np.int64]] = []  # of each pair (decisions, 2): numbers among all decisions
        begins, executed, values = list[int](), list[int](), list[float]()
        for number in (pair for pair in chosen if abs(rewards[pair, 0] - rewards[pair, 1]) > 0):  # no NaN
            sides = []
            for side in np.argsort(-rewards[number]).tolist():
                steps, counts = pairs.decisions(2 * number + side)
                sides.append(len(begins) + np.arange(len(steps)))
                begins += steps.tolist()
                executed += counts.tolist()
                values += [float(rewards[number, side])] * len(steps)
            longest = max(map(len, sides))
            rows.append(np.stack([np.resize(side, longest) for side in sides], 1))
        if not rows:
            raise DataError(
                f"No pair of {demos.source} is left of which one segment is preferred; label more of them, "
                "collect more, or change label=."
            )
        self.num_pairs = len(rows)
        self._decisions = torch.from_numpy(np.concatenate(rows)).to(device)
        self._begins = torch.tensor(begins, device=device)
        self._reward = torch.tensor(values, device=device)
        future = torch.arange(policy.spec.action_horizon, device=device)
        self._executed = future < torch.tensor(executed, device=device)[:, None]
        keys = [CHUNK, *policy.action_space.state_keys]
        arrays = {key: each[self._begins] for key, each in as_tensors(demos, keys, device).items()}
        # Relative actions are relative to the newest observation.
        self._chunk = policy.encode(arrays[CHUNK], {key: each[:, None] for key, each in arrays.items()})

    def __len__(self) -> int:
        return 2 * len(self._decisions)

    def batch(self, index: Tensor) -> Batch:
        """The two decisions of ``index[0::2] // 2`` each, ``(B,)`` in all."""
        decision = self._decisions[index[0::2] // 2].flatten()
        return replace(
            super().batch(self._begins[decision]),
            action=self._chunk[decision],
            mask=self._executed[decision],
            reward=self._reward[decision],
        )

    def rows(self, step: int, batch_size: int, seed: int) -> Tensor:
        """Both rows of shuffled pairs of decisions."""
        pair = shuffled_index(step, batch_size // 2, len(self._decisions), seed)
        return torch.stack([2 * pair, 2 * pair + 1], 1).flatten()

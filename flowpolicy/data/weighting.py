"""Batches from several data sets, each with its share; see :mod:`flowpolicy.data.mixture`."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.data.sampling import ChunkSampler, shuffled_epoch, shuffled_range
from flowpolicy.runs.seeds import derived_seed


class MixtureSampler(ChunkSampler):
    """A sampler over several data sets that lie one after another.

    With weights, each batch has of each data set its share, to the rounding that the next batches make up
    for, and each goes through its own epochs. Without, all windows together are one epoch. Either is a pure
    function of step and seed.

    Args:
        observation: key -> ``(steps, *shape)``.
        action: ``(steps, A)``.
        episode_ends: ``(episodes,)``.
        obs_horizon: T_o.
        action_horizon: T.
        episodes: indices of the episodes to draw from.
        parts: name -> its episodes; a data set that has none of ``episodes`` is left out.
        weights: of the data sets; None: in proportion to their windows.
        learnt: see :class:`~flowpolicy.data.sampling.ChunkSampler`.
        transform: likewise.

    Attributes:
        shares: name -> share of the samples.
    """

    def __init__(
        self,
        observation: Mapping[str, Tensor],
        action: Tensor,
        episode_ends: NDArray[Any],
        obs_horizon: int,
        action_horizon: int,
        episodes: Iterable[int],
        *,
        parts: Mapping[str, range],
        weights: Sequence[float] | None = None,
        learnt: NDArray[np.bool_] | None = None,
        transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        chosen = sorted(episodes)
        super().__init__(
            observation,
            action,
            episode_ends,
            obs_horizon,
            action_horizon,
            chosen,
            learnt,
            transform=transform,
        )
        owner, first = np.searchsorted(episode_ends, self._steps.cpu().numpy(), side="right"), 0
        found: dict[str, range] = {}
        for name, numbers in parts.items():
            count = int(np.isin(owner, numbers).sum())
            if count:
                found[name] = range(first, first + count)
            first += count
        self.parts = found
        given = dict(zip(parts, weights, strict=True)) if weights is not None else {}
        self._is_weighted = weights is not None
        sizes = {name: given.get(name, len(windows)) for name, windows in found.items()}
        self.shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        self._orders = [functools.lru_cache(maxsize=2)(shuffled_epoch) for _ in found]

    def rows(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The windows ``(batch_size,)`` of training step ``step``, of all data sets in a random order."""
        if not self._is_weighted:
            return super().rows(step, batch_size, seed)
        shares = list(self.shares.values())
        before, after = (apportioned(shares, count * batch_size) for count in (step, step + 1))
        drawn = []
        for number, windows in enumerate(self.parts.values()):
            order = functools.partial(self._orders[number], derived_seed(seed, "dataset", number))
            first, count = before[number], after[number] - before[number]
            drawn.append(windows.start + shuffled_range(first, count, len(windows), order))
        generator = torch.Generator().manual_seed(derived_seed(seed, "mixture", step))
        return torch.cat(drawn)[torch.randperm(batch_size, generator=generator)]


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """How ``total`` things are dealt out by shares, which sum to 1: each count grows with the total.

    Webster's method: the k-th thing of a share w, counted from 0, has the place (k + 1/2) / w, and those
    with the first places are dealt out.
    """
    reach = max(0, total - len(shares))  # all places up to here are among them
    counts = [int(share * reach + 0.5) for share in shares]
    places = [((counts[number] + 0.5) / share, number) for number, share in enumerate(shares)]
    heapq.heapify(places)
    for _ in range(total - sum(counts)):
        _, number = places[0]
        counts[number] += 1
        heapq.heapreplace(places, ((counts[number] + 0.5) / shares[number], number))
    return counts

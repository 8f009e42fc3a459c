"""Where to recompute: block-wise adaptive caching (Ji et al. 2025, BAC) and the uniform control.

Every function is about E network evaluations and, where it needs them, the matrices of
:mod:`flowpolicy.acceleration.caching.similarity`. Updates are tuples of ascending evaluation numbers that
start at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.settings import require

Updates = tuple[int, ...]


def uniform(num_evaluations: int, count: int) -> Updates:
    """``count`` evaluations at equal distances, the control that knows nothing of the network."""
    _check(num_evaluations, count)
    return tuple(i * num_evaluations // count for i in range(count))


def adaptive_caching(similarity: NDArray[np.floating[Any]], count: int) -> Updates:
    """The ``count`` updates whose outputs resemble most what they stand for (ACS, anchor form).

    An output computed at ``a`` and used until ``z`` gains sum_{t=a..z} Sim[a, t]; the segments that the
    updates cut [0, E) into are chosen by dynamic programming for the largest total gain:

        dp[1][i] = gain(0, i),    dp[m][i] = max_{j < i} dp[m-1][j] + gain(j+1, i)

    Args:
        similarity: Sim ``(E, E)``, mean cosine similarity of the block's outputs.
        count: S, from 1 to E.
    """
    size = len(similarity)
    _check(size, count)
    # gain[a, z]: cumulative along each row from its own column; -inf where z < a.
    upper = np.triu(np.ones((size, size), dtype=bool))
    gain = np.where(upper, np.cumsum(np.where(upper, similarity, 0.0), axis=1), -np.inf)
    return _best_segments(gain, count)


def consecutive_caching(similarity: NDArray[np.floating[Any]], count: int) -> Updates:
    """Ablation: a segment gains the similarities of *consecutive* outputs in it, as the paper says it.

    That sum is the total over all neighbours less one term at each boundary, so that the best updates are
    simply the ``count - 1`` evaluations least like the one before.
    """
    size = len(similarity)
    _check(size, count)
    steps = np.concatenate([[0.0], np.diagonal(similarity, 1)])
    total = np.cumsum(steps)
    gain = np.where(np.triu(np.ones((size, size), dtype=bool)), total[None, :] - total[:, None], -np.inf)
    return _best_segments(gain, count)


def bubbling_union(
    updates: Sequence[Updates],
    kinds: Sequence[str],
    layers: Sequence[int],
    error: Sequence[float],
    count: int,
) -> tuple[Updates, ...]:
    """Recompute error-prone blocks also whenever a feed-forward block after them is (BUA).

    A stale output of an early block reaches a feed-forward block later in the network, which then
    computes from it and keeps the error. Each of the ``count`` blocks with the largest caching error
    takes the union of its updates with the *original* updates of the feed-forward blocks of its own and
    later layers.

    Args:
        updates: per block, in the order of computation.
        kinds: per block, ``SA``, ``CA`` or ``FFN``.
        layers: per block.
        error: per block, mean pairwise L1 distance of its outputs.
        count: n, blocks that are given a union; 0 leaves all as they are.
    """
    require(0 <= count <= len(updates), "bubbles", count, f"between 0 and the {len(updates)} blocks")
    worst = sorted(range(len(updates)), key=lambda block: (-error[block], block))[:count]
    result = [tuple(steps) for steps in updates]
    for block in worst:
        union = set(updates[block])
        for other, kind in enumerate(kinds):
            if kind == "FFN" and layers[other] >= layers[block]:
                union |= set(updates[other])
        result[block] = tuple(sorted(union))
    return tuple(result)


def _best_segments(gain: NDArray[np.floating[Any]], count: int) -> Updates:
    """Starts of the ``count`` segments of [0, E) with the largest total ``gain[a, z]``, ends included."""
    size = len(gain)
    best = gain[0].copy()
    starts = np.zeros((count, size), dtype=np.int64)
    for m in range(1, count):
        # total[s, i]: the last segment starts at s, the ones before end at s - 1.
        total = np.full((size, size), -np.inf)
        total[1:] = best[:-1, None] + gain[1:]
        starts[m], best = total.argmax(axis=0), total.max(axis=0)
    result, end = [], size - 1
    for m in range(count - 1, -1, -1):
        start = int(starts[m][end])
        result.append(start)
        end = start - 1
    return tuple(reversed(result))


def _check(size: int, count: int) -> None:
    require(1 <= count <= size, "updates", count, f"between 1 and the {size} evaluations")

"""Pairs of segments that are made up, small enough for a test."""

from __future__ import annotations

import numpy as np

from flowpolicy.data.recording import RecordedStore
from flowpolicy.data.store import Demonstrations
from flowpolicy.preferences.pairs import CHUNK, CHUNK_STEP, FRAME, PAIRS, Pairs


def rows(steps, rng, frames=False, height=8):
    """An episode of three observed numbers, chunks of four actions, and its whole number as the reward."""
    chunk = rng.normal(size=(steps, 4, 1)).astype(np.float32)
    ends = np.zeros(steps, bool)
    ends[-1] = True
    found = {
        "observation": rng.normal(size=(steps, 3)).astype(np.float32),
        "action": chunk[:, 0].copy(), "reward": np.full(steps, rng.integers(10), np.float32),
        "terminated": ~ends & ends, "truncated": ends,
        CHUNK: chunk.repeat(4, 0)[:steps], CHUNK_STEP: (np.arange(steps) % 4).astype(np.int16),
    }  # fmt: skip
    if frames:
        found[FRAME] = rng.integers(256, size=(steps, height, 12, 3)).astype(np.uint8)
    return found


def toy_pairs(lengths=(8, 4, 6, 8, 4, 4)):
    """Pairs of segments of these lengths, in memory."""
    rng = np.random.default_rng(0)
    episodes = [rows(length, rng) for length in lengths]
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    return Pairs(Demonstrations(arrays, np.cumsum(lengths), {PAIRS: {"seed": 0}, "fps": 20.0}))


def write_toy_pairs(path, count=3, frames=True):
    """The same as a store, with pictures."""
    rng = np.random.default_rng(0)
    with RecordedStore(path, {PAIRS: {"seed": 0}, "fps": 20.0}) as store:
        for number in range(2 * count):
            store.append(rows(4 + number % 3, rng, frames))
            store.end_episode(sync=False)
    return path

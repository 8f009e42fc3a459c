"""Similarity of a block's outputs between network evaluations, from which caching schedules are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.acceleration.caching.schedule import ScheduleKey, full_schedule
from flowpolicy.acceleration.engine import BlockEngine
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.progress import progress

MINIMUM_OBSERVATIONS = 64


@dataclass(frozen=True)
class Similarity:
    """Of every block b and every two evaluations i, j; the mean over calibration samples.

    Attributes:
        cosine: Sim_b[i, j], cosine similarity of the outputs, flattened over tokens and channels,
            ``(blocks, E, E)``.
        spread: its standard deviation over samples.
        error: mean over i < j of the mean absolute difference of the outputs, ``(blocks,)``: the caching
            error by which BUA ranks blocks.
        observations: calibration observations.
        noise_seeds: noises x_0 for each of them.
    """

    cosine: NDArray[np.float64]
    spread: NDArray[np.float64]
    error: NDArray[np.float64]
    observations: int
    noise_seeds: int


class SimilarityMeter:
    """Compares every block's outputs while a sampler runs.

    ``observe`` takes one output; ``sampled`` ends a part of the samples, all of whose blocks were observed
    at all evaluations.

    Args:
        blocks: number of residual branches.
        evaluations: E.
    """

    def __init__(self, blocks: int, evaluations: int) -> None:
        self._total = np.zeros((blocks, evaluations, evaluations))
        self._squares, self._error = np.zeros_like(self._total), np.zeros(blocks)
        self._outputs: list[list[Tensor]] = [[] for _ in range(blocks)]
        self._evaluations, self._samples = evaluations, 0

    def observe(self, evaluation: int, block: int, output: Tensor) -> None:
        """A block's output ``(rows, T, d)``; evaluations come in their order."""
        self._outputs[block].append(output.flatten(1).float())

    def sampled(self) -> None:
        """Add the samples observed since the last time.

        Raises:
            ConfigError: they were observed at another number of evaluations.
        """
        for block, kept in enumerate(self._outputs):
            if len(kept) != self._evaluations:
                raise ConfigError(
                    f"A chunk took {len(kept)} evaluations of the network, not {self._evaluations}; "
                    "give the number that the sampler makes."
                )
            stacked = torch.stack(kept, 1)  # (rows, E, T d)
            kept.clear()
            unit = stacked / stacked.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            cosine = (unit @ unit.transpose(1, 2)).double()
            self._total[block] += cosine.sum(0).cpu().numpy()
            self._squares[block] += (cosine**2).sum(0).cpu().numpy()
            self._error[block] += float(_pairwise_l1(stacked).double().sum())
        self._samples += len(stacked)

    def result(self, observations: int, noise_seeds: int) -> Similarity:
        """The means over all samples."""
        mean = self._total / self._samples
        spread = np.sqrt(np.maximum(self._squares / self._samples - mean**2, 0.0))
        return Similarity(mean, spread, self._error / self._samples, observations, noise_seeds)


@torch.no_grad()
def measure_similarity(
    policy: FlowPolicy,
    observations: Mapping[str, Tensor],
    sampling: SamplerSpec,
    *,
    noise_seeds: int = 4,
    seed: int = 0,
    rows: int = 8,
) -> Similarity:
    """Run the whole computation on calibration observations, and compare every block's outputs.

    Args:
        policy: a flow policy.
        observations: key -> ``(N, T_o, *shape)`` in physical units, N >= 64, from episodes that no
            evaluation uses.
        sampling: K, solver and grid.
        noise_seeds: noises for each observation.
        seed: of the noises.
        rows: samples at once.

    Raises:
        DataError: too few observations.
        FlowPolicyError: observations of a wrong shape or with NaN.
    """
    checked = policy.check_observations(observations)
    count = len(next(iter(checked.values())))
    if count < MINIMUM_OBSERVATIONS:
        raise DataError(
            f"The calibration set has {count} observations; give at least {MINIMUM_OBSERVATIONS}, "
            "from episodes that evaluation does not use."
        )
    sampling = policy.checked(sampling)
    key = ScheduleKey.of(policy, sampling)
    engine = BlockEngine(policy, sampling, rows, full_schedule(key))
    meter = SimilarityMeter(len(key.blocks), key.num_evaluations)
    generator = torch.Generator().manual_seed(seed)
    noise = policy.noise(count * noise_seeds, None, generator)
    order = torch.arange(count).repeat(noise_seeds)
    engine.observe = meter.observe
    parts = list(range(0, len(order), rows))
    for start in progress(parts, "calibrating"):
        part = order[start : start + rows].to(policy.device)
        engine({name: values[part] for name, values in checked.items()}, noise[start : start + rows])
        meter.sampled()
    return meter.result(count, noise_seeds)


def _pairwise_l1(outputs: Tensor) -> Tensor:
    """Mean over i < j of the mean absolute difference, ``(rows, E, D) -> (rows,)``.

    Sorted along the evaluations, the sum over pairs is a weighted sum: sum_{i<j} |a_i - a_j| = sum_r (2 r
    - E + 1) a_(r).
    """
    size = outputs.shape[1]
    if size < 2:
        return outputs.new_zeros(len(outputs))
    weights = 2 * torch.arange(size, device=outputs.device, dtype=outputs.dtype) - size + 1
    pairs = size * (size - 1) / 2
    return (outputs.sort(dim=1).values * weights[:, None]).sum(1).mean(-1) / pairs

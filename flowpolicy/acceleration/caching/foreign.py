"""Block-wise caching in other transformers: any model that calls an ``nn.TransformerDecoder``.

    model.decoder = CachedDecoder(model.decoder, num_evaluations=100, chunk_shape=(16, 2), sampler="ddpm")
    schedules = calibrate_decoder(model.decoder, sample, observations, updates=10)
    model.decoder.schedule = schedules["acs+bua"]   # from here on the model's own sampler reuses blocks

The model's sampler stays as it is; the decoder counts the evaluations that it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowpolicy.acceleration.caching.calibration import caching_schedules
from flowpolicy.acceleration.caching.program import Evaluation, Recompute, program_of
from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.caching.similarity import MINIMUM_OBSERVATIONS, SimilarityMeter
from flowpolicy.acceleration.engine import Observe
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.policy.fingerprint import weights_hash
from flowpolicy.runs.progress import progress
from flowpolicy.settings import require

KINDS = ("SA", "CA", "FFN")


class CachedDecoder(nn.Module):
    """Stands in for a decoder, and recomputes its residual branches when a schedule says so.

    It takes what ``nn.TransformerDecoder`` takes. Every call is the next evaluation of a chunk; after the
    last one the next chunk begins. Without reuse it computes the decoder's own numbers.

    Args:
        decoder: with ``norm_first=True``: only then do its branches add up in one residual stream.
        num_evaluations: calls that the model's sampler makes for a chunk, E.
        chunk_shape: (T, A) of the model's chunks.
        sampler: name of the model's sampler, part of what a schedule is made for.

    Raises:
        ConfigError: not such a decoder.
    """

    def __init__(
        self,
        decoder: nn.TransformerDecoder,
        *,
        num_evaluations: int,
        chunk_shape: tuple[int, int],
        sampler: str,
    ) -> None:
        super().__init__()
        if not isinstance(decoder, nn.TransformerDecoder):
            raise ConfigError(f"The decoder is a {type(decoder).__name__}; give an nn.TransformerDecoder.")
        if not all(cast("Any", layer).norm_first for layer in decoder.layers):
            raise ConfigError("The decoder's layers normalise after adding; caching needs norm_first=True.")
        require(num_evaluations >= 2, "num_evaluations", num_evaluations, "at least 2, to reuse between them")
        self.decoder, self.observe = decoder, cast("Observe | None", None)
        blocks = tuple(f"{layer}.{kind}" for layer in range(len(decoder.layers)) for kind in KINDS)
        self.key = ScheduleKey(
            weights_hash(decoder), num_evaluations, sampler, num_evaluations, blocks, chunk_shape
        )
        self.schedule = full_schedule(self.key)

    @property
    def schedule(self) -> Schedule:
        """What is recomputed when; setting it begins a new chunk.

        Raises:
            ConfigError: a schedule of another decoder, sampler or number of evaluations.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        schedule.check_key(self.key)
        self._schedule = schedule
        self._program: Sequence[Evaluation] = program_of(schedule.updates, schedule.key.num_evaluations)
        self.restart()

    def restart(self) -> None:
        """Begin a new chunk, where a sampler was stopped in the middle of one."""
        self._evaluation = 0
        self._kept: dict[Any, Tensor] = {}

    def forward(self, tgt: Tensor, memory: Tensor, **masks: Any) -> Tensor:
        """The decoder's output ``(B, T, d)``; masks are those of ``nn.TransformerDecoder.forward``."""
        h, kept, evaluation = tgt, self._kept, self._evaluation
        for operation in self._program[evaluation]:
            if isinstance(operation, Recompute):
                output = self._branch(operation.block, h, memory, masks)
                if operation.kept:
                    kept[operation.block] = output
                if self.observe is not None:
                    self.observe(evaluation, operation.block, output)
            else:
                if operation.fresh:
                    kept[operation.blocks] = torch.stack([kept[block] for block in operation.blocks]).sum(0)
                output = kept[operation.blocks]
            h = h + output
        self._evaluation += 1
        if self._evaluation == len(self._program):
            self.restart()
        return h if self.decoder.norm is None else cast("Tensor", self.decoder.norm(h))

    def _branch(self, block: int, h: Tensor, memory: Tensor, masks: dict[str, Any]) -> Tensor:
        layer, kind = cast("Any", self.decoder.layers[block // 3]), block % 3
        if kind == 0:
            mask, padding = masks.get("tgt_mask"), masks.get("tgt_key_padding_mask")
            return cast("Tensor", layer._sa_block(layer.norm1(h), mask, padding))
        if kind == 1:
            mask, padding = masks.get("memory_mask"), masks.get("memory_key_padding_mask")
            return cast("Tensor", layer._mha_block(layer.norm2(h), memory, mask, padding))
        return cast("Tensor", layer._ff_block(layer.norm3(h)))


def calibrate_decoder(
    decoder: CachedDecoder,
    sample: Callable[[Tensor, int], object],
    observations: Tensor,
    *,
    updates: int = 10,
    bubbles: int = 5,
    noise_seeds: int = 4,
    rows: int = 8,
) -> dict[str, Schedule]:
    """Schedules of every method for a model that uses the decoder.

    Args:
        decoder: in its place in the model.
        sample: runs the model's sampler once for ``(rows, ...)`` observations and a seed of its noise.
        observations: ``(N, ...)``, N >= 64, as the model takes them, from episodes that no evaluation uses.
        updates: S.
        bubbles: n, blocks that BUA gives a union.
        noise_seeds: noises for each observation.
        rows: observations at once.

    Raises:
        DataError: too few observations, or NaN among them.
        ConfigError: a sampler whose number of calls differs from the decoder's ``num_evaluations``.
    """
    count = len(observations)
    if count < MINIMUM_OBSERVATIONS:
        raise DataError(
            f"The calibration set has {count} observations; give at least {MINIMUM_OBSERVATIONS}, "
            "from episodes that evaluation does not use."
        )
    if not torch.isfinite(observations).all():
        raise DataError("The calibration set holds NaN or infinity; no schedule is made from it.")
    key = decoder.key
    most = key.num_evaluations
    require(updates <= most, "updates", updates, f"at most the {most} evaluations")
    meter = SimilarityMeter(len(key.blocks), key.num_evaluations)
    before, decoder.schedule, decoder.observe = decoder.schedule, full_schedule(key), meter.observe
    parts = [(seed, start) for seed in range(noise_seeds) for start in range(0, count, rows)]
    try:
        for seed, start in progress(parts, "calibrating"):
            sample(observations[start : start + rows], seed * count + start)
            meter.sampled()
    finally:
        decoder.observe, decoder.schedule = None, before
    about = {"observations": count, "noise_seeds": noise_seeds}
    return caching_schedules(key, meter.result(count, noise_seeds), updates, bubbles, about)

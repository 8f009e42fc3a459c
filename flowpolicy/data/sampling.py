"""Action chunks cut from demonstrations: tensors on the training device, a batch is one gather."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError
from flowpolicy.features import Feature
from flowpolicy.settings import require


@dataclass(frozen=True)
class Batch:
    """Training samples.

    Attributes:
        observation: key -> ``(B, T_o, *shape)``, oldest first.
        action: ``(B, T, A)``, from the step of the newest observation on.
        mask: ``(B, T)`` bool, False where the action lies beyond the episode's end, or is not to be learnt.
        noise: x_0 ``(B, T, A)`` that a flow made the actions from; None of demonstrated ones.
        reward: ``(B,)``, how good what came of the actions was; None where that is not known.
    """

    observation: dict[str, Tensor]
    action: Tensor
    mask: Tensor
    noise: Tensor | None = None
    reward: Tensor | None = None

    def __len__(self) -> int:
        return len(self.action)


class ChunkSampler:
    """Every step of every episode as the start of one action chunk.

    A batch lies on the device of the actions. Observations may lie elsewhere, as images do that do not fit
    there; they are looked up where they are.

    The window of a step ``s`` is observations ``s - T_o + 1 .. s`` and actions ``s .. s + T - 1``. Before an
    episode's start the first observation is repeated; beyond its end the last action is, and ``mask`` is
    False there. No window crosses an episode's end.

    Args:
        observation: key -> ``(steps, *shape)``.
        action: ``(steps, A)``.
        episode_ends: ``(episodes,)``.
        obs_horizon: T_o.
        action_horizon: T.
        episodes: indices of the episodes to draw from; None means all.
        learnt: ``(steps,)`` bool, which actions show what to do; chunks begin at those, and ``mask`` is False
            at any other. None means all.
        transform: makes what is learnt of a window's actions ``(B, T, A)`` and its step ``(B,)``, which
            counts all steps from 0; None learns the actions as they are.

    Attributes:
        parts: name of a data set -> its windows, where there are several.

    Raises:
        DataError: no chunk is left.
    """

    parts: Mapping[str, range] = MappingProxyType({})

    def __init__(
        self,
        observation: Mapping[str, Tensor],
        action: Tensor,
        episode_ends: NDArray[Any] | Tensor,
        obs_horizon: int,
        action_horizon: int,
        episodes: Iterable[int] | None = None,
        learnt: NDArray[np.bool_] | None = None,
        *,
        transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        require(obs_horizon >= 1, "obs_horizon", obs_horizon, "at least 1")
        require(action_horizon >= 1, "action_horizon", action_horizon, "at least 1")
        device = action.device
        ends = torch.as_tensor(np.asarray(episode_ends), dtype=torch.int64)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        chosen = (
            torch.arange(len(ends)) if episodes is None else torch.tensor(list(episodes), dtype=torch.int64)
        )
        if len(chosen) == 0:
            raise DataError(
                "No episode is left to draw chunks from; lower the validation share or add episodes."
            )
        steps = torch.cat([torch.arange(int(starts[i]), int(ends[i])) for i in chosen])
        self._learnt = None if learnt is None else torch.from_numpy(learnt).to(device)
        if learnt is not None:
            steps = steps[torch.from_numpy(learnt)[steps]]
            if len(steps) == 0:
                raise DataError("No step to learn from is in these episodes; change data.only_source.")
        owner = torch.searchsorted(ends, steps, right=True)
        self.observation = dict(observation)
        self.action = action
        self._transform = transform
        self._steps = steps.to(device)
        self._first = starts[owner].to(device)
        self._last = (ends[owner] - 1).to(device)
        self._past = torch.arange(1 - obs_horizon, 1, device=device)
        self._future = torch.arange(action_horizon, device=device)

    def __len__(self) -> int:
        return len(self._steps)

    def batch(self, index: Tensor) -> Batch:
        """The windows ``index`` ``(B,)``, each in [0, len)."""
        step = self._steps[index, None]
        seen = torch.maximum(step + self._past, self._first[index, None])
        wanted = step + self._future
        last = self._last[index, None]
        row, mask = torch.minimum(wanted, last), wanted <= last
        if self._learnt is not None:
            mask &= self._learnt[row]
        action = self.action[row]
        return Batch(
            observation={
                key: value[seen.to(value.device)].to(self.action.device)
                for key, value in self.observation.items()
            },
            action=action if self._transform is None else self._transform(action, step[:, 0]),
            mask=mask,
        )

    def rows(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The windows ``(batch_size,)`` of training step ``step``; see :func:`shuffled_index`."""
        return shuffled_index(step, batch_size, len(self), seed)


def as_tensors(
    demos: Demonstrations, keys: Iterable[str] | Mapping[str, Feature], device: torch.device | str
) -> dict[str, Tensor]:
    """Arrays as tensors on ``device``: float32, and uint8 of images.

    What has no statistics to be normalised by, as images, stays on the CPU where it would take more than half
    of the device's free memory.

    Args:
        demos: the demonstrations.
        keys: key -> feature, or keys of which the demonstrations say what they are.
        device: of the tensors.

    Raises:
        DataError: a missing key, values that are none of their kind, or numbers that float32 cannot tell
            apart.
    """
    tensors = {}
    for key in keys:
        feature = keys[key] if isinstance(keys, Mapping) else demos.feature(key)
        stored = demos.arrays.get(key)
        if feature.dtype == np.float32 and stored is not None and collapses_in_float32(stored):
            raise DataError(
                f"{demos.source}: '{key}' varies too little around too large a value for float32 (as UTM "
                "metres or seconds since 1970 do); subtract a constant from it, in the recording and on the "
                "robot, or leave it out."
            )
        values = torch.from_numpy(np.ascontiguousarray(demos.values(key, feature)))
        problem = feature.problem(values)
        if problem:
            raise DataError(f"{demos.source}: '{key}' {problem}.")
        stays = not feature.normalized().any() and not _fits(values, torch.device(device))
        tensors[key] = values if stays else values.to(device)
    return tensors


def _fits(values: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or values.nbytes < torch.cuda.mem_get_info(device)[0] // 2


def shuffled_index(step: int, batch_size: int, length: int, seed: int) -> Tensor:
    """Sample numbers ``(batch_size,)`` of training step ``step``: epochs are permutations, back to back.

    A pure function of its arguments: a resumed run, and every process of a distributed one, finds the
    same batch without any state to save.
    """
    return shuffled_range(step * batch_size, batch_size, length, functools.partial(_permutation, seed))


def shuffled_range(first: int, count: int, length: int, permutation: Callable[[int, int], Tensor]) -> Tensor:
    """Samples ``first`` to ``first + count`` of epochs back to back, of ``length`` samples each.

    Args:
        first: of all samples that are ever drawn.
        count: how many.
        length: samples of an epoch.
        permutation: the order ``(length,)`` of an epoch from its number and ``length``.
    """
    parts, end = [torch.empty(0, dtype=torch.int64)], first + count
    while first < end:
        epoch, offset = divmod(first, length)
        taken = min(length - offset, end - first)
        parts.append(permutation(epoch, length)[offset : offset + taken])
        first += taken
    return torch.cat(parts)


def shuffled_epoch(seed: int, epoch: int, length: int) -> Tensor:
    """The order ``(length,)`` of an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(length, generator=generator)


_permutation = functools.lru_cache(maxsize=2)(shuffled_epoch)
"""A batch spans two epochs at most, but for tiny data sets."""

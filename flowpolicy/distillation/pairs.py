"""Pairs of noise and chunk: what a teacher makes of x_0 at demonstrated observations, kept as a folder.

``pairs.json`` says what they were made with, ``00000.safetensors`` and its successors hold a block each:
``step`` ``(N,)``, the step of the demonstrations whose observation window it was, ``noise`` x_0 and ``chunk``
x_1 ``(N, T, A)`` in normalised units; of a teacher with a steering all M x_0 that it takes for a chunk,
``(N, T, M A)``. A block is a function of the seed and its number, so that more can be added at any time, and
an interrupted program leaves nothing half done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.data.sampling import Batch, ChunkSampler
from flowpolicy.errors import CheckpointError, ConfigError, DataError
from flowpolicy.files.reading import read_versioned, stored_tensors
from flowpolicy.files.storage import atomic_file, save_tensors, write_json
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.ranges import NonNegativeInt, PositiveInt
from flowpolicy.runs.progress import progress_bar
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import Settings, shown

BLOCK, ROWS = 1024, 256
"""Pairs of a file, and those that are made at once."""
FINE_STEPS = 32
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PairsConfig(Settings, prefix="pairs"):
    """How pairs are made.

    Attributes:
        path: folder of the pairs, which several runs may share; None keeps them in the run's own.
        count: how many.
        num_steps: K of the teacher; None takes the K that it is tuned for, or 32.
        solver: of the teacher; None takes its own.
        seed: of the observations and of x_0.
    """

    path: str | None = None
    count: PositiveInt = 40_000
    num_steps: PositiveInt | None = None
    solver: str | None = None
    seed: NonNegativeInt = 0

    def sampling(self, teacher: FlowPolicy) -> SamplerSpec:
        """How the teacher makes its chunks."""
        fine = None if teacher.config.tuned is not None else FINE_STEPS
        return teacher.checked(SamplerSpec(num_steps=self.num_steps or fine, solver=self.solver))


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory.

    Attributes:
        step: ``(N,)`` int64, among all steps of the demonstrations.
        noise: x_0 ``(N, T, A)``; None where it plays no part.
        chunk: x_1 ``(N, T, A)``, normalised.
    """

    step: Tensor
    noise: Tensor | None
    chunk: Tensor


class PairSampler(ChunkSampler):
    """Batches of pairs in place of demonstrated chunks, at the observations of the demonstrations.

    Args:
        observation: key -> ``(steps, *shape)``.
        action: ``(steps, A)``.
        episode_ends: ``(episodes,)``.
        obs_horizon: T_o.
        pairs: of any episodes.
        episodes: those whose pairs are taken.

    Raises:
        DataError: no pair is of these episodes.
    """

    def __init__(
        self,
        observation: Mapping[str, Tensor],
        action: Tensor,
        episode_ends: NDArray[Any],
        obs_horizon: int,
        pairs: Pairs,
        episodes: Iterable[int],
    ) -> None:
        # Of all episodes: the window of a step is its number.
        super().__init__(observation, action, episode_ends, obs_horizon, 1)
        owner = np.searchsorted(episode_ends, pairs.step.numpy(), side="right")
        taken = torch.from_numpy(np.isin(owner, list(episodes)))
        if not taken.any():
            raise DataError("There are no pairs of these episodes; take more pairs (pairs.count).")

        def kept(part: Tensor) -> Tensor:
            return part[taken].to(action.device)

        noise = None if pairs.noise is None else kept(pairs.noise)
        self._pairs = Pairs(kept(pairs.step), noise, kept(pairs.chunk))

    def __len__(self) -> int:
        return len(self._pairs.step)

    def batch(self, index: Tensor) -> Batch:
        """The pairs ``index`` ``(B,)``, each in [0, len)."""
        noise, chunk = self._pairs.noise, self._pairs.chunk[index]
        noise = None if noise is None else noise[index]
        everywhere = torch.ones(chunk.shape[:2], dtype=torch.bool, device=chunk.device)
        return replace(super().batch(self._pairs.step[index]), action=chunk, mask=everywhere, noise=noise)


def make_pairs(
    teacher: FlowPolicy, windows: ChunkSampler, source: str, config: PairsConfig, folder: Path
) -> None:
    """Make the pairs that ``folder`` lacks.

    Args:
        teacher: a flow policy.
        windows: its normalised observations, one window a step of the demonstrations.
        source: name of the demonstrations.
        config: settings.
        folder: of the pairs.

    Raises:
        ConfigError: the folder has other pairs, or the teacher cannot be sampled so.
    """
    _claim(teacher, len(windows), source, config, folder)
    missing = [block for block in _blocks(config, folder) if not block.exists()]
    with progress_bar(len(missing) * BLOCK or None, "make pairs") as bar:
        for file in missing:
            with atomic_file(file) as temporary:
                save_tensors(vars(_made(teacher, windows, config, int(file.stem))), temporary)
            bar.update(BLOCK)


@torch.no_grad()
def _made(teacher: FlowPolicy, windows: ChunkSampler, config: PairsConfig, number: int) -> Pairs:
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "pairs", number))
    step = torch.randint(len(windows), (BLOCK,), generator=generator)
    noise = torch.randn((BLOCK, *teacher.spec.noise_shape), generator=generator)
    sampling, chunks = config.sampling(teacher), list[Tensor]()
    for rows in range(0, BLOCK, ROWS):
        part = slice(rows, rows + ROWS)
        observation = windows.batch(step[part].to(teacher.device)).observation
        start = noise[part].to(teacher.device)
        chunks.append(teacher.sample(observation, start, sampling))
    return Pairs(step, noise, torch.cat(chunks).cpu())


def read_pairs(teacher: FlowPolicy, steps: int, config: PairsConfig, folder: Path) -> Pairs:
    """The first ``config.count`` pairs of a folder.

    Raises:
        CheckpointError: a block is damaged, or of other shapes than the teacher's, or of more than ``steps``
            steps of demonstrations.
    """
    horizon, numbers = teacher.spec.noise_shape
    draws = 1 if teacher.steering is None else teacher.steering.draws
    shapes = {"noise": (BLOCK, horizon, numbers), "chunk": (BLOCK, horizon, numbers // draws)}
    blocks = []
    for file in _blocks(config, folder):
        stored = stored_tensors(file)
        stored.without("step").require_shapes(shapes, "pairs.json")
        block = stored.read()
        step = block.get("step", torch.empty(0))
        if step.dtype != torch.int64 or len(step) != BLOCK or not ((step >= 0) & (step < steps)).all():
            raise CheckpointError(f"{file}: 'step' is damaged; remove the file, and it is made again.")
        blocks.append(block)
    joined = {name: torch.cat([block[name] for block in blocks])[: config.count] for name in blocks[0]}
    return Pairs(**joined)


def _blocks(config: PairsConfig, folder: Path) -> list[Path]:
    return [folder / f"{number:05d}.safetensors" for number in range(math.ceil(config.count / BLOCK))]


def _claim(teacher: FlowPolicy, steps: int, source: str, config: PairsConfig, folder: Path) -> None:
    """Write down what the pairs are made with, or refuse a folder that says something else."""
    about = {
        "teacher": fingerprint(teacher), "sampling": config.sampling(teacher).content(), "seed": config.seed,
        "demonstrations": source, "steps": steps,
    }  # fmt: skip
    file = folder / "pairs.json"
    if not file.exists():
        write_json(file, {"format_version": FORMAT_VERSION, **about})
        return
    found = read_versioned(file, "folder of pairs", FORMAT_VERSION, "choose another pairs.path")
    for name, value in about.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{folder} holds pairs of {name} {shown(found.get(name))} and not {shown(value)}; choose "
                "another pairs.path."
            )

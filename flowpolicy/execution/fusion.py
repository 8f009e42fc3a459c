"""Chunks with their start steps, and the fusion of successive chunks into one stream of actions.

A step is an executed action: the robot took a valid command. Nothing else counts, no tick in which it held,
stood still or was late. A chunk sampled from the observation after r executed actions holds the actions of
steps r, r + 1, ..., r + T - 1; when it arrives at step r + delay its first ``delay`` actions are in the past
and are never executed. The delay is therefore counted in executed actions and never estimated from a clock.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.execution.rotations import Rotation
from flowpolicy.settings import choose, require

Action = NDArray[np.float32]


@dataclass(frozen=True)
class Chunk:
    """A sampled chunk.

    Attributes:
        actions: ``(T, A)`` in physical units.
        start: step of the observation it was sampled from, and of its first action.
        arrived: step at which it could first be used.
        waited: ticks of the loop in which the robot executed nothing while this chunk was sampled.
    """

    actions: Action
    start: int
    arrived: int
    waited: int = 0

    @property
    def delay(self) -> int:
        """Actions executed between the observation and the first use."""
        return self.arrived - self.start

    @property
    def end(self) -> int:
        """First step that it says nothing about."""
        return self.start + len(self.actions)

    def at(self, step: int) -> Action | None:
        """The action ``(A,)`` of a step; None outside the chunk."""
        return self.actions[step - self.start] if self.start <= step < self.end else None


@dataclass(frozen=True)
class Prefix:
    """What the next chunk should agree with: the actions already committed to, and how strongly.

    Attributes:
        actions: ``(T, A)`` in physical units, of the steps of the chunk to be sampled; 0 where unknown.
        weights: ``(T,)`` in [0, 1]; 1 where the action will have been executed before the chunk arrives.
    """

    actions: Action
    weights: NDArray[np.float32]


class Fusion(Protocol):
    """How chunks that overlap become one action a step. One object serves one robot."""

    name: ClassVar[str]

    def reset(self) -> None:
        """Forget all chunks: a new episode begins."""

    def add(self, chunk: Chunk) -> None:
        """A chunk has arrived."""

    def action(self, step: int) -> Action | None:
        """The action ``(A,)`` of a step, or None where no chunk covers it."""

    def prefix(self, step: int) -> Prefix | None:
        """What a chunk requested at ``step`` should agree with; None where it is sampled freely."""


class Switch:
    """Naive switching: the newest chunk alone, from the step of its arrival."""

    name: ClassVar[str] = "switch"

    def __init__(self) -> None:
        self._newest: Chunk | None = None

    def reset(self) -> None:
        """Forget the chunk."""
        self._newest = None

    def add(self, chunk: Chunk) -> None:
        """Take the chunk, unless a newer one is here already."""
        if self._newest is None or chunk.start >= self._newest.start:
            self._newest = chunk

    def action(self, step: int) -> Action | None:
        """The newest chunk's action."""
        return None if self._newest is None else self._newest.at(step)

    def prefix(self, step: int) -> Prefix | None:
        """Chunks are sampled freely."""
        return None


FAR = 0.25
"""Share of a dimension's range by which chunks may differ and still be averaged."""


class TemporalEnsembling:
    """The weighted mean of all chunks that cover a step (Zhao et al. 2023, ACT, section IV-B).

    The weight of the i-th oldest chunk is exp(-m i): the oldest counts most. Dimensions that are declared as
    rotations are averaged as such. Where chunks disagree on another one by more than :data:`FAR` of its
    range, their mean would be near none of them (an undeclared angle, two ways around an obstacle): the
    newest chunk's value is taken.

    Args:
        decay: m; small values take up new observations slowly. ACT's is 0.01.
        width: ``(A,)`` range of the actions; None: chunks never disagree.
        rotations: which dimensions are rotations.
    """

    name: ClassVar[str] = "ensemble"

    def __init__(
        self, decay: float = 0.01, width: Action | None = None, rotations: Sequence[Rotation] = ()
    ) -> None:
        require(decay >= 0, "decay", decay, "0 or more")
        self.decay, self.width, self.rotations = decay, width, tuple(rotations)
        self._chunks: list[Chunk] = []

    def reset(self) -> None:
        """Forget the chunks."""
        self._chunks.clear()

    def add(self, chunk: Chunk) -> None:
        """Take the chunk in the order of its observation, whenever it arrives."""
        insort(self._chunks, chunk, key=lambda other: other.start)

    def action(self, step: int) -> Action | None:
        """The weighted mean of the chunks that cover the step."""
        self._chunks = [chunk for chunk in self._chunks if chunk.end > step]
        rows = [action for chunk in self._chunks if (action := chunk.at(step)) is not None]
        if not rows:
            return None
        weights = np.exp(-self.decay * np.arange(len(rows)))
        values = np.asarray(rows, dtype=np.float64)
        mean = weights @ values / weights.sum()
        if self.width is not None and len(rows) > 1:
            mean = np.where(np.ptp(values, axis=0) > FAR * self.width, values[-1], mean)
        for rotation in self.rotations:
            mean[rotation.dims] = rotation.mean(values[:, rotation.dims], weights)
        fused: Action = mean.astype(np.float32)
        return fused

    def prefix(self, step: int) -> Prefix | None:
        """Chunks are sampled freely."""
        return None


class RealTimeChunking(Switch):
    """Switching to chunks that were sampled to agree with what was committed to (Black et al. 2025).

    When a chunk is requested, the actions that will be executed before it arrives are known: they are
    frozen, and those after them pull with a weight that falls to 0 where the old chunk ends and the new one
    is free (algorithm 1 and equation 5 there). How many will be executed is the second largest of the delays
    counted recently: a chunk then rarely arrives later than assumed, and a single outlier freezes nothing.
    Those counts outlive an episode: they belong to the machine. The first chunk of
    an episode, for which a worker may still be warming up, and one that the robot waited for do not measure
    what is executed meanwhile: the ticks that such a chunk took count only while there is no other.

    Args:
        horizon: T.
        memory: how many counted delays are remembered.
    """

    name: ClassVar[str] = "rtc"

    def __init__(self, horizon: int, memory: int = 10) -> None:
        super().__init__()
        require(memory >= 1, "memory", memory, "at least 1")
        self.horizon = horizon
        self._delays: deque[int] = deque(maxlen=memory)
        self._fallback = 0

    def add(self, chunk: Chunk) -> None:
        """Take the chunk, and remember its delay."""
        if self._newest is None or chunk.waited:
            self._fallback = chunk.delay + chunk.waited
        else:
            self._delays.append(chunk.delay)
        super().add(chunk)

    def prefix(self, step: int) -> Prefix | None:
        """The rest of the newest chunk, with its weights; None where there is none."""
        if self._newest is None or step >= self._newest.end:
            return None
        known = self._newest.actions[max(step - self._newest.start, 0) :]
        actions = np.zeros((self.horizon, known.shape[1]), dtype=np.float32)
        actions[: len(known)] = known
        largest = sorted(self._delays or [self._fallback])[-2:]
        return Prefix(actions, prefix_weights(self.horizon, largest[0], len(known)))


def prefix_weights(horizon: int, frozen: int, overlap: int) -> NDArray[np.float32]:
    """How strongly each action of a new chunk is held to the old one (Black et al. 2025, equation 5).

    1 for the ``frozen`` first, then c (e^c - 1) / (e - 1) with c falling linearly, and 0 beyond the
    ``overlap`` first, which is all that the old chunk reaches: T minus the actions executed between the two.

    Returns:
        ``(horizon,)``.
    """
    index, frozen = np.arange(horizon), min(frozen, overlap)
    c = (overlap - index) / (overlap - frozen + 1)
    soft = c * np.expm1(c) / np.expm1(1.0)
    return np.where(index < frozen, 1.0, np.where(index < overlap, soft, 0.0)).astype(np.float32)


def build_fusion(
    name: str, horizon: int, execute_horizon: int, max_delay: int, width: Action | None = None,
    rotations: Sequence[Rotation] = (),
) -> Fusion:  # fmt: skip
    """A fusion strategy by its name: ``switch``, ``ensemble`` or ``rtc``.

    Args:
        name: of the strategy.
        horizon: T.
        execute_horizon: T_e.
        max_delay: most actions executed while a chunk is under way to arrive.
        width: ``(A,)`` range of the actions, where it is known.
        rotations: which dimensions of an action are rotations.

    Raises:
        ConfigError: T < T_e + max_delay: a chunk would end before the next one arrives.
    """
    require(execute_horizon >= 1, "execute_horizon", execute_horizon, "at least 1")
    require(max_delay >= 0, "max_delay", max_delay, "0 or more")
    total = execute_horizon + max_delay
    allowed = f"at most the chunk length {horizon}, or a chunk ends before the next one arrives"
    require(total <= horizon, "execute_horizon + max_delay", total, allowed)
    strategy = choose(_STRATEGIES, name, "fusion")
    return strategy(horizon, width, rotations)


_STRATEGIES: dict[str, Callable[[int, Action | None, Sequence[Rotation]], Fusion]] = {
    "switch": lambda horizon, width, rotations: Switch(),
    "ensemble": lambda horizon, width, rotations: TemporalEnsembling(width=width, rotations=rotations),
    "rtc": lambda horizon, width, rotations: RealTimeChunking(horizon),
}

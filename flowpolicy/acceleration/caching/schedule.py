"""Cache schedules: which residual blocks are recomputed at which network evaluation, and for which policy."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import read_versioned
from flowpolicy.files.storage import write_json
from flowpolicy.flow.grids import build_grid
from flowpolicy.flow.sampler_spec import MOST_STEPS, SamplerSpec
from flowpolicy.models.blocks import AddressableBlocks
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.ranges import between, not_empty
from flowpolicy.settings import Settings, build, require

FORMAT_VERSION = 2


@dataclass(frozen=True)
class ScheduleKey(Settings, prefix="schedule.key"):
    """What a schedule was made for; it is worth nothing for anything else.

    Attributes:
        fingerprint: of the weights and normalisers; see :func:`fingerprint`.
        num_steps: K.
        solver: its evaluations a step are in ``num_evaluations``.
        num_evaluations: network evaluations of one chunk, E.
        blocks: ``layer.kind`` of every block in the order of computation.
        chunk_shape: (T, A).
        grid: of flow times; None is the uniform one.
    """

    fingerprint: str
    num_steps: Annotated[int, between(1, MOST_STEPS)]
    solver: str
    num_evaluations: int
    blocks: Annotated[tuple[str, ...], not_empty("name")]
    chunk_shape: tuple[int, int]
    grid: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, evaluations = self.num_steps, self.num_evaluations
        allowed = f"1 to 4 for each of the {steps} steps"
        require(steps <= evaluations <= 4 * steps, "schedule.key.num_evaluations", evaluations, allowed)
        require(min(self.chunk_shape) >= 1, "schedule.key.chunk_shape", self.chunk_shape, "positive")
        build_grid(self.grid)

    @classmethod
    def of(cls, policy: FlowPolicy, sampling: SamplerSpec) -> ScheduleKey:
        """The key of a policy sampled in this way.

        Raises:
            ConfigError: the policy cannot be sampled so, has no steps to cache between, or its network has no
                blocks to cache.
        """
        sampling = policy.checked(sampling)
        policy.objective.require_flow()
        network = policy.network
        if not isinstance(network, AddressableBlocks):
            raise ConfigError(
                f"The network '{policy.config.model.network}' has no addressable blocks, so nothing can be "
                "cached between evaluations; leave out schedule=, or train model.network=transformer."
            )
        return cls(
            fingerprint(policy),
            sampling.steps,
            str(sampling.solver),
            policy.objective.nfe(sampling),
            tuple(f"{block.layer}.{block.kind}" for block in network.blocks()),
            policy.spec.chunk_shape,
            None if sampling.grid_object == build_grid(None) else sampling.grid,
        )

    def sampling(self) -> dict[str, Any]:
        """The entries of a :class:`SamplerSpec` that it was made for."""
        return {"num_steps": self.num_steps, "solver": self.solver, "grid": self.grid}


@dataclass(frozen=True)
class Schedule:
    """For each block the evaluations at which it is recomputed; at all others its last output is used
    again.

    Attributes:
        key: the policy and the way of sampling it.
        updates: per block, ascending evaluation numbers from 0; the first is always 0.
        method: how it was found (``acs``, ``acs+bua``, ``uniform``, ``searched``, ``full``, ...).
        settings: of the method, such as ``updates`` S and ``bubbles`` n.
        calibration: observations, noise seeds and what was measured on them.
    """

    key: ScheduleKey
    updates: tuple[tuple[int, ...], ...]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks, last = len(self.key.blocks), self.key.num_evaluations - 1
        allowed = f"one entry for each of the {blocks} blocks"
        require(len(self.updates) == blocks, "schedule.updates", len(self.updates), allowed)
        allowed = f"ascending evaluations from 0 to at most {last}"
        for name, steps in zip(self.key.blocks, self.updates, strict=True):
            ascending = all(a < b for a, b in itertools.pairwise(steps))
            ok = bool(steps) and steps[0] == 0 and ascending and steps[-1] <= last
            require(ok, f"schedule.updates of block {name}", list(steps), allowed)

    @property
    def share(self) -> float:
        """f: blocks recomputed, over all blocks of all evaluations."""
        return sum(map(len, self.updates)) / (len(self.updates) * self.key.num_evaluations)

    def check(self, policy: FlowPolicy, sampling: SamplerSpec) -> None:
        """Raise a ConfigError where it was made for another policy or another way of sampling."""
        if self.key.fingerprint != fingerprint(policy):  # first: another policy may not even have this K
            raise _made_for_another("checkpoint")
        self.check_key(ScheduleKey.of(policy, sampling))

    def check_key(self, wanted: ScheduleKey) -> None:
        """Raise a ConfigError where it was made for another key."""
        for item in dataclasses.fields(ScheduleKey):
            mine, theirs = getattr(self.key, item.name), getattr(wanted, item.name)
            is_same = build_grid(mine) == build_grid(theirs) if item.name == "grid" else mine == theirs
            if not is_same:
                hidden = item.name in ("fingerprint", "blocks")
                shown = "" if hidden else f" ({mine} in the schedule, {theirs} here)"
                raise _made_for_another(_NAMES.get(item.name, item.name) + shown)

    def save(self, path: Path | str) -> Path:
        """Write it as JSON, all or nothing."""
        write_json(path, {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> Schedule:
        """Read a schedule.

        Raises:
            CheckpointError: no such file, or no schedule in it.
        """
        content = read_versioned(
            path, "cache schedule", FORMAT_VERSION, "make one with flowpolicy calibrate-cache"
        )
        if isinstance(content.get("key"), dict):
            content["key"].pop("level", None)  # of format 1, which follows from the rest
        try:
            return build(cls, content, "schedule")
        except ConfigError as error:
            raise CheckpointError(f"{path} is not a cache schedule: {error}") from error


def _made_for_another(what: str) -> ConfigError:
    return ConfigError(
        f"The cache schedule was made for another {what}; make one with flowpolicy calibrate-cache."
    )


_NAMES = {
    "fingerprint": "checkpoint",
    "num_steps": "number of steps",
    "num_evaluations": "number of evaluations",
    "chunk_shape": "chunk shape (T, A)",
    "blocks": "network",
    "grid": "grid of flow times",
}


def full_schedule(key: ScheduleKey) -> Schedule:
    """Everything recomputed."""
    every = tuple(range(key.num_evaluations))
    return Schedule(key, (every,) * len(key.blocks), "full")

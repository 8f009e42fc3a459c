"""Pairs of segments: what a policy does next from one and the same state, twice."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.data.recording import RecordedStore
from flowpolicy.errors import TaskError
from flowpolicy.evaluation.rendering import NO_GL_BACKEND, choose_gl_backend
from flowpolicy.evaluation.rollout import check_spaces
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.evaluation.video import follow_robot, frame_timing
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.features.stored import KINDS
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.preferences.pairs import CHUNK, CHUNK_STEP, FRAME, PAIRS
from flowpolicy.ranges import NonNegativeInt, PositiveInt
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.progress import progress_bar
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import Settings

logger = logging.getLogger(__name__)
SYNCED_EVERY_S = 10.0
"""What a killed program loses at most."""
FRAME_SIZE = 240
"""Pixels that a side of a frame has at most."""
Rows = dict[str, Any]


@dataclass(frozen=True)
class CollectionConfig(Settings):
    """How pairs are collected.

    Attributes:
        checkpoint: the policy.
        out: folder of the store; None is ``preferences/<task>.zarr``.
        pairs: how many.
        segment_steps: steps of a segment, unless its episode ends before.
        latest_start: steps of an episode after which the two segments begin, at most; drawn for each pair.
        video: keep frames, for a person to look at.
        seed: of starts and noise.
        num_envs: environments side by side, two for each pair.
        device: of the policy.
        threads: CPU threads of torch; None leaves its choice.
    """

    checkpoint: str
    out: str | None = None
    pairs: PositiveInt = 300
    segment_steps: PositiveInt = 64
    latest_start: NonNegativeInt = 200
    video: bool = False
    seed: NonNegativeInt = 0
    num_envs: PositiveInt = 40
    device: str = "auto"
    threads: PositiveInt | None = None


def collect_preferences(config: CollectionConfig, env: Mapping[str, Any] | None) -> tuple[Path, Task]:
    """Play the pairs that the store lacks; its path and the task.

    The store's episodes 2i and 2i + 1 are the segments of pair i. Both begin at the state that the policy has
    reached from one reset and with one sequence of x_0, from where each has an x_0 of its own. Up to T_o - 1
    steps before are part of the episodes, so that histories are whole.

    Raises:
        FlowPolicyError: the checkpoint, the task or the place is not usable, or the store is of other work.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = FlowPolicy.load(config.checkpoint, resolve_device(config.device))
    task = task_of(policy.spec.task, env, config.checkpoint)
    about = dataclasses.asdict(config) | {"policy": fingerprint(policy), "env": dataclasses.asdict(task)}
    for name in ("out", "pairs", "num_envs", "device", "threads"):  # pair i is the same with any
        del about[name]
    attributes = {
        "env_id": task.simulator(), "task": task.name, "fps": task.control_hz, PAIRS: about,
        KINDS: {key: feature.declaration() for key, feature in policy.spec.features.items()},
    }  # fmt: skip
    store = RecordedStore(config.out or f"preferences/{task.name}.zarr", attributes, resume=True)
    with store, progress_bar(config.pairs, "collect pairs", done=store.num_episodes // 2) as bar:
        if store.num_episodes:
            logger.info("%s goes on after pair %d.", store.path, store.num_episodes // 2)
        synced = time.monotonic()
        for pair in _play(policy, task, config, store.num_episodes // 2):
            is_due = time.monotonic() - synced > SYNCED_EVERY_S
            for number, rows in enumerate(pair):
                store.append(rows)
                store.end_episode(sync=is_due and number == 1)  # both of a pair, or none
            synced = time.monotonic() if is_due else synced
            bar.update(1)
    return store.path, task


def _play(
    policy: FlowPolicy, task: Task, config: CollectionConfig, first: int
) -> Iterator[tuple[Rows, Rows]]:
    """Pairs in their order, from number ``first`` on; several are played side by side."""
    numbers, ready = iter(range(first, config.pairs)), dict[int, tuple[Rows, Rows]]()
    places = [
        _Pair(policy, task, config) for _ in range(min(max(1, config.num_envs // 2), config.pairs - first))
    ]
    try:
        while True:
            for place in places:
                if place.idle and (number := next(numbers, None)) is not None:
                    place.start(number)
            live = [side for place in places for side in place.live()]
            if not live:
                break
            batch = {
                key: np.concatenate([side.history.arrays[key] for side in live])
                for key in policy.spec.features
            }
            noise = torch.stack([side.noise() for side in live])
            for side, chunk in zip(live, policy.act(batch, noise=noise).cpu().numpy(), strict=True):
                side.chunk = chunk
            for place in places:
                if not place.idle and (pair := place.step()) is not None:
                    ready[place.number] = pair
            while first in ready:
                yield ready.pop(first)
                first += 1
    finally:
        for place in places:
            place.close()


@dataclass
class _Side:
    """One of the two environments of a pair, and what happened there."""

    env: Any
    history: HistoryBuffer
    shape: tuple[int, int]
    stride: int | None
    generator: torch.Generator = field(default_factory=torch.Generator)
    rows: list[Rows] = field(default_factory=list)
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    ended: bool = False
    chunk: NDArray[Any] = field(default_factory=lambda: np.empty(0))

    def reset(self, seed: int) -> None:
        observation, _ = self.env.reset(seed=seed)
        self.generator.manual_seed(seed)
        self.history.restart()
        self._observe(observation)
        self.rows, self.frames, self.ended = [], [], False

    def noise(self) -> torch.Tensor:
        return torch.randn(self.shape, generator=self.generator)

    def execute(self, steps: int, *, seen: bool) -> None:
        """The first actions of the chunk, until the episode ends; ``seen`` by who is shown the segment."""
        for step, action in enumerate(self.env.bounded(self.chunk[:steps])):
            row = {key: values[0, -1].copy() for key, values in self.history.arrays.items()}
            if seen and self.stride is not None:
                self._look()
            observation, reward, terminated, truncated, _ = self.env.step_bounded(action)
            self._observe(observation)
            row |= {
                "action": np.asarray(action, np.float32), "reward": np.float32(reward),
                "terminated": np.bool_(terminated), "truncated": np.bool_(truncated),
                CHUNK: np.asarray(self.chunk, np.float32), CHUNK_STEP: np.int16(step),
            }  # fmt: skip
            self.rows.append(row)
            if terminated or truncated:
                self.ended = True
                return

    def _observe(self, observation: Mapping[str, NDArray[Any]]) -> None:
        self.history.add({key: values[None] for key, values in observation.items()})

    def _look(self) -> None:
        """Keep what is seen now; between two frames, the one before."""
        if self.frames and len(self.frames) % (self.stride or 1):
            self.frames.append(self.frames[-1])
            return
        frame = self.env.render()
        if frame is None:
            raise TaskError("The environment renders no frames; leave out video=true.")
        self.frames.append(small(frame))

    def segment(self) -> Rows:
        """The rows as arrays; the last one ends the episode."""
        last = self.rows[-1]
        last["truncated"] = np.bool_(not last["terminated"])
        arrays = {key: np.stack([row[key] for row in self.rows]) for key in last}
        if self.frames:  # none of the steps before
            frames = self.frames[:1] * (len(self.rows) - len(self.frames)) + self.frames
            arrays[FRAME] = np.stack(frames)
        return arrays


class _Pair:
    """A place where one pair after another is played."""

    def __init__(self, policy: FlowPolicy, task: Task, config: CollectionConfig) -> None:
        self.number, self.idle = 0, True
        self._config, self._execute, self._lead = config, task.execute_horizon, policy.spec.obs_horizon - 1
        stride = frame_timing(task.control_hz)[0] if config.video else None
        self._sides: list[_Side] = []
        for _ in range(2):
            env = _rendering(task) if config.video else task.make()
            history = HistoryBuffer.of_features(policy.spec.features, 1, policy.spec.obs_horizon)
            self._sides.append(_Side(env, history, policy.spec.noise_shape, stride))
        check_spaces(self._sides[0].env, policy, f"Task '{task.name}'")

    def start(self, number: int) -> None:
        """Begin pair ``number``."""
        self.number, self.idle = number, False
        self._rng = np.random.default_rng((self._config.seed, number))
        self._reset(self._config.latest_start)

    def _reset(self, latest: int) -> None:
        """Draw the step where the two part, a multiple of T_e up to ``latest``, and reset both."""
        self._branch = self._execute * int(self._rng.integers(latest // self._execute + 1))
        self._age = 0
        for side in self._sides:
            side.reset(derived_seed(self._config.seed, "pair", self.number))
        self._part()

    def _part(self) -> None:
        """Give both noise of their own, where the segments begin."""
        if self._age == self._branch:
            for index, side in enumerate(self._sides):
                side.generator.manual_seed(derived_seed(self._config.seed, "segment", self.number, index))
                side.rows = side.rows[len(side.rows) - min(self._lead, len(side.rows)) :]
                for row in side.rows:
                    row[CHUNK_STEP] = np.int16(-1)

    def live(self) -> list[_Side]:
        """The sides that need a chunk."""
        return [] if self.idle else [side for side in self._sides if not side.ended]

    def step(self) -> tuple[Rows, Rows] | None:
        """Execute the sides' chunks; the segments, when both are over."""
        alike = self._age < self._branch
        if alike:
            self._sides[1].chunk = self._sides[0].chunk
        left = self._execute if alike else self._config.segment_steps - (self._age - self._branch)
        for side in self._sides:
            if not side.ended:
                side.execute(min(self._execute, left), seen=not alike)
        self._age += self._execute
        if alike:
            if any(side.ended for side in self._sides):  # before it came to the segments
                self._reset(self._age - self._execute)
            else:
                self._part()
            return None
        self.idle = left <= self._execute or all(side.ended for side in self._sides)
        if not self.idle:
            return None
        first, second = (side.segment() for side in self._sides)
        return first, second

    def close(self) -> None:
        for side in self._sides:
            side.env.close()


def small(frame: NDArray[Any]) -> NDArray[np.uint8]:
    """A frame ``(H, W, 3)`` with sides of at most :data:`FRAME_SIZE` pixels, each the mean of a square."""
    factor = math.ceil(max(frame.shape[:2]) / FRAME_SIZE)
    height, width = (side // factor for side in frame.shape[:2])
    squares = frame[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.asarray(squares.mean((1, 3)), np.uint8)


def _rendering(task: Task) -> Any:
    if choose_gl_backend() is None and "mujoco" in str(task.env_id).lower():
        raise TaskError(f"Task '{task.name}': {NO_GL_BACKEND}; or leave out video=true.")
    env = task.make(render_mode="rgb_array")
    follow_robot(env)
    return env

"""Whole episodes of a policy in a task, many side by side in one process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.errors import TaskError
from flowpolicy.evaluation.episodes import EpisodeRecord, columns
from flowpolicy.evaluation.result import EvaluationResult
from flowpolicy.evaluation.task import Task
from flowpolicy.evaluation.video import EpisodeVideo
from flowpolicy.execution.receding_horizon import ChunkPolicy, RecedingHorizon
from flowpolicy.features.presence import offered
from flowpolicy.runs.progress import progress_bar
from flowpolicy.settings import require

EVALUATION_SEED = 1_000_000
"""First seed of evaluation episodes, out of reach of the seeds that demonstrations and training use."""

_LATENCY_CALLS = 20
_LATENCY_SECONDS = 2.0


def evaluate(
    policy: ChunkPolicy,
    task: Task,
    *,
    episodes: int,
    seed: int = EVALUATION_SEED,
    num_envs: int = 20,
    num_steps: int | None = None,
    solver: str | None = None,
    zero_noise: bool = False,
    record: int = 0,
    video: Path | str | None = None,
    act_options: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> EvaluationResult:
    """Run ``episodes`` whole episodes and say how they went.

    Episode i starts from environment seed ``seed + i`` and draws its noise x_0 from a generator of the
    same seed, so two policies are compared on paired starts and paired noise. Which episodes run side by
    side changes nothing but the rounding of a matrix product of another batch size (a chaotic simulator
    can amplify that in a single episode). All environments live in this process: a slot that finishes
    starts the next episode at the next request, so that every request is one full batch. Actions are
    clipped to the environment's bounds.

    Args:
        policy: anything with the interface of :class:`flowpolicy.execution.receding_horizon.ChunkPolicy`.
        task: the environment and the horizons.
        episodes: how many.
        seed: environment seed of the first episode.
        num_envs: environments side by side.
        num_steps: integration steps K; None takes the policy's own.
        solver: ODE solver; None takes the policy's own.
        zero_noise: x_0 = 0 instead of N(0, I), another policy that must be labelled as such.
        record: how many episodes, from the first, are recorded into ``video``.
        video: path of the mp4; without it none is recorded.
        act_options: further keyword arguments of ``policy.act``.
        show_progress: draw a bar where stderr is a terminal.

    Raises:
        TaskError: when the environment cannot be made or its spaces do not fit the policy.
        ConfigError: when a number is out of range.
        FlowPolicyError: when the policy answers with NaN or infinity.
    """
    require(episodes >= 1, "episodes", episodes, "at least 1")
    require(num_envs >= 1, "num_envs", num_envs, "at least 1")
    require(record >= 0, "record", record, "0 or more")
    num_envs = min(num_envs, episodes)
    nfe = policy.nfe(num_steps, solver)
    horizon = RecedingHorizon(
        policy,
        num_envs,
        task.execute_horizon,
        num_steps=num_steps,
        solver=solver,
        zero_noise=zero_noise,
        act_options=act_options,
    )
    recorder = EpisodeVideo(video, task, caption=_caption(policy, task, nfe)) if record and video else None
    slots: list[_Slot] = []
    try:
        for number in range(num_envs):
            env = recorder.make() if recorder is not None and number == 0 else task.make()
            slots.append(_Slot(env, recorder if number == 0 else None))
            if number == 0:
                check_spaces(env, policy, f"Task '{task.name}'")
        rollout = _Rollout(horizon, slots, episodes, seed, record if recorder is not None else 0)
        with progress_bar(episodes if show_progress else None, f"evaluate {task.name}") as bar:
            rollout.run(bar.update if show_progress else None)
        recorded = recorder.close() if recorder is not None else None
    finally:
        for slot in slots:
            slot.env.close()
        if recorder is not None:
            recorder.close()
    return EvaluationResult(
        seeds=np.arange(seed, seed + episodes),
        **columns(rollout.records),  # type: ignore[arg-type]
        simulation_seconds=rollout.simulation_seconds,
        inference_seconds=horizon.inference_seconds,
        chunks=horizon.chunks,
        ms_per_chunk=_latency(horizon, slots[0].observation),
        nfe=nfe,
        video=recorded,
    )


def check_spaces(env: Any, policy: ChunkPolicy, name: str) -> None:
    """Refuse an environment whose spaces are not what the policy was trained on.

    Args:
        env: anything with ``observation_space`` and ``action_space`` of one environment.
        policy: the policy.
        name: what the message calls the environment.

    Raises:
        TaskError: see :meth:`PolicySpec.check <flowpolicy.spec.PolicySpec.check>`; also where observations
            are of a type that their kind refuses.
    """
    from gymnasium import spaces

    from flowpolicy.evaluation.environment import boxes_of

    action, boxes = env.action_space, boxes_of(env.observation_space)
    shapes = {key: tuple(box.shape) for key, box in boxes.items()}
    policy.spec.check(name, shapes, tuple(action.shape) if isinstance(action, spaces.Box) else None)
    for key, feature in offered(policy.spec.features, boxes).items():
        problem = feature.type_problem(boxes[key].dtype)
        if problem:
            raise TaskError(f"{name}: observation '{key}' {problem}.")


class _Slot:
    """One environment and the episode that runs in it, if any."""

    def __init__(self, env: Any, recorder: EpisodeVideo | None) -> None:
        self.env = env
        self.recorder = recorder
        self.recording = False
        self.record: EpisodeRecord | None = None
        self.observation: dict[str, NDArray[Any]] = {}

    def start(self, record: EpisodeRecord, seed: int, recording: bool) -> None:
        self.record, self.recording = record, recording
        self.observation, _ = self.env.reset(seed=seed)
        self._show(record)

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action; True where the episode has ended."""
        assert self.record is not None
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.record.add(float(reward), info)
        ended = bool(terminated or truncated)
        self._show(self.record, ended)
        if ended:
            self.record = None
        return ended

    def _show(self, record: EpisodeRecord, last: bool = False) -> None:
        if self.recording and self.recorder is not None:
            self.recorder.capture(self.env, record.length, record.ret, last=last)


class _Rollout:
    """The loop over episodes; ``records`` fill as they run."""

    def __init__(
        self, horizon: RecedingHorizon, slots: list[_Slot], episodes: int, seed: int, record: int
    ) -> None:
        self.horizon, self.slots, self.seed = horizon, slots, seed
        self.records = [EpisodeRecord() for _ in range(episodes)]
        self.simulation_seconds = 0.0
        # Slot 0 records the video: its episodes follow one another, so that one file holds them in order.
        self._recorded = deque(range(min(record, episodes)))
        self._waiting = deque(range(len(self._recorded), episodes))

    def run(self, on_episode: Any) -> None:
        while live := self._fill():
            for _ in range(self.horizon.execute_horizon):
                batch = {
                    key: np.stack([self.slots[slot].observation[key] for slot in live])
                    for key in self.horizon.policy.spec.observation_shapes
                }
                actions = self.horizon.actions(batch, live)
                started = time.perf_counter()
                running = []
                for slot, action in zip(live, actions, strict=True):
                    if not self.slots[slot].step(action):
                        running.append(slot)
                    elif on_episode is not None:
                        on_episode(1)
                self.simulation_seconds += time.perf_counter() - started
                live = running
                if not live:
                    break

    def _fill(self) -> list[int]:
        """Give each idle slot its next episode; the slots that run now."""
        started = time.perf_counter()
        for number, slot in enumerate(self.slots):
            if slot.record is None:
                recording = number == 0 and bool(self._recorded)
                queue = self._recorded if recording else self._waiting
                if queue:
                    episode = queue.popleft()
                    slot.start(self.records[episode], self.seed + episode, recording)
                    self.horizon.reset(number, torch.Generator().manual_seed(self.seed + episode))
        self.simulation_seconds += time.perf_counter() - started
        return [number for number, slot in enumerate(self.slots) if slot.record is not None]


def _latency(horizon: RecedingHorizon, observation: dict[str, NDArray[Any]]) -> float:
    """Median milliseconds of one chunk sampled alone, as on a robot."""
    chunks, seconds = horizon.chunks, horizon.inference_seconds
    times: list[float] = []
    while len(times) < 3 or (len(times) < _LATENCY_CALLS and sum(times) < _LATENCY_SECONDS):
        horizon.reset(0, 0)
        before = horizon.inference_seconds
        horizon.actions({key: array[None] for key, array in observation.items()}, [0])
        times.append(horizon.inference_seconds - before)
    horizon.chunks, horizon.inference_seconds = chunks, seconds  # the measurement is not part of the rollouts
    return 1000 * float(np.median(times))


def _caption(policy: ChunkPolicy, task: Task, nfe: int) -> str:
    return f"{task.name}  {policy.spec.name}  NFE {nfe}  T_e {task.execute_horizon}"

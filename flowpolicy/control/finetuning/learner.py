"""The learner beside a control loop: reads finished episodes, updates, and writes newer policies."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from flowpolicy.control.finetuning.config import RobotFinetuningConfig
from flowpolicy.control.finetuning.rewards import rewarded
from flowpolicy.control.recorder import FAILED, SUCCEEDED
from flowpolicy.control.robot import Action
from flowpolicy.data.recording import num_recorded, recorded_episodes
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.finetuning.offpolicy.algorithms import build_algorithm
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.recorder import STATE_FILE
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.loggers import build_loggers
from flowpolicy.runs.worker_process import Failure

CHECKPOINT, SESSIONS, EPISODES = "checkpoint", "sessions", "episodes.zarr"
AT_ONCE = 10
"""Updates between two looks at what the loop does."""
LOOK_S = 0.5
"""Between two looks at the recording; while there is nothing to learn, between two of those."""
NICENESS = 10
"""Of the learner's process: whatever the loop's do goes first."""


@dataclass(frozen=True)
class Lesson:
    """What a learner is told.

    Attributes:
        config: the settings.
        run_dir: of the run.
        low: least command of the robot, ``(A,)``.
        high: largest.
    """

    config: RobotFinetuningConfig
    run_dir: Path
    low: Action
    high: Action


class RobotLearner:
    """Learns from the episodes that the sessions of a run have recorded.

    Everything that it goes on from is in ``training_state.zip``; episodes that it had not taken yet when that
    was written are taken again from their stores.

    Args:
        lesson: what it is told.

    Raises:
        FlowPolicyError: the checkpoint, a setting or a saved state is not usable.
    """

    def __init__(self, lesson: Lesson) -> None:
        config, self.run_dir = lesson.config, lesson.run_dir
        self.config, self._state = config, lesson.run_dir / STATE_FILE
        torch.set_num_threads(config.learner_threads)
        device = resolve_device(config.device)
        if self._state.exists():
            demos = self._demonstrations(FlowPolicy.load(self.run_dir / CHECKPOINT))
            self.model = OffPolicy.load(self._state, None, device, demonstrations=demos)
        else:
            base = FlowPolicy.load(config.checkpoint, device)
            self.model = OffPolicy(
                base, None, algorithm=build_algorithm(config.algorithm),
                demonstrations=self._demonstrations(base), num_steps=config.num_steps, grid=config.grid,
                execute_horizon=config.control.execute_horizon, seed=config.seed, device=device,
                **vars(config.offpolicy),
            )  # fmt: skip
        self.model.adopt_robot(lesson.low, lesson.high)
        self.model.adopt_demonstrations()
        self.loggers = build_loggers(("csv",), self.run_dir, {}, {}, self.model.num_timesteps)
        self._metrics: dict[str, float] = {}
        self._counts: dict[Path, int] = {}  # episodes of earlier sessions
        self._looked = self._published = self._saved = float("-inf")

    def run(self, is_over: Callable[[float], bool]) -> None:
        """Learn until ``is_over(seconds)``, which waits at most so long for the end."""
        self._keep(now=True)
        while not is_over(0.0 if self._due() else LOOK_S / 5):
            self._look()
            if count := min(AT_ONCE, self._due()):
                self._metrics = self.model.update(count, self.model.batch_size)
            self._keep()
        self._looked = float("-inf")
        self._look()
        self._keep(now=True)

    def about(self) -> dict[str, Any]:
        """How far it has come."""
        return {
            "steps": self.model.num_timesteps, "episodes": self.model.iteration,
            "updates": self.model.learner.updates, "seconds_of_updates": self.model.seconds["update"],
        }  # fmt: skip

    def _due(self) -> int:
        """Updates that the experience so far allows."""
        steps, shared = self.model.num_timesteps, self.config.offpolicy
        if steps < max(shared.learning_starts, 1) or not self.model.replay_buffer.size():
            return 0
        chunks = steps / self.model.actor_critic.execute_horizon
        return int(shared.utd * chunks) + shared.offline_updates - self.model.learner.updates

    def _look(self) -> None:
        """Take the episodes that have ended since the last look."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked, before = now, 0
        *earlier, present = sorted((self.run_dir / SESSIONS).glob("*")) or [self.run_dir]
        for session in (*earlier, present):
            if session not in self._counts or self.model.iteration < before + self._counts[session]:
                found = recorded_episodes(session / EPISODES, max(0, self.model.iteration - before))
                if found is not None:
                    self._take(rewarded(found, self.config.reward))
            if session is not present and session not in self._counts:
                self._counts[session] = num_recorded(session / EPISODES)
            before += self._counts.get(session, 0)

    def _take(self, episodes: Demonstrations) -> None:
        starts, ends, returns = episodes.episode_starts, episodes.episode_ends, episodes.episode_returns
        judged = {
            number: success
            for mark, success in ((SUCCEEDED, 1.0), (FAILED, 0.0))
            for number in episodes.masks.get(mark, [])
        }
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            self.model.take(episodes.select_episodes([number]), judged.get(number) == 1.0)
            assert returns is not None
            row = {
                "rollout/return": float(returns[number]), "rollout/length": float(end - start),
                "train/updates": float(self.model.learner.updates),
            }  # fmt: skip
            if number in judged:
                row["rollout/success"] = judged[number]
            self.loggers.log(self.model.num_timesteps, {**row, **self._metrics})

    def _keep(self, *, now: bool = False) -> None:
        """Save the state and publish the policy where it is time."""
        moment, config = time.monotonic(), self.config
        if now or moment - self._saved > config.save_every_s:
            self.model.save(self._state)
            self._saved = moment
        if now or moment - self._published > config.publish_every_s:
            policy, model = self.model.deployed_policy(), self.model
            metadata = model.origin(policy, model.algorithm.name, model.sampling.num_steps)
            policy.config = dataclasses.replace(policy.config, metadata=metadata)
            policy.save(self.run_dir / CHECKPOINT)
            self._published = moment

    def _demonstrations(self, policy: FlowPolicy) -> Demonstrations | None:
        path = self.config.demonstrations
        if not path or not self.config.offpolicy.demonstration_share:
            return None
        kinds = {key: feature.declaration() for key, feature in policy.spec.features.items()}
        return read_demonstrations(path, tuple(policy.spec.observation_shapes), kinds=kinds)


def serve(connection: Connection[Any, Any], lesson: Lesson) -> None:
    """The process: say when the first policy is there, learn until told to end, and say how far it came.

    Where the loop's process is gone, the learner saves and ends too.
    """
    _step_back(lesson.config.learner_threads)
    is_ready = False

    def is_over(seconds: float) -> bool:
        nonlocal is_ready
        if not is_ready:  # what run() does first is to write the policy
            connection.send(None)
            is_ready = True
        return connection.poll(seconds)

    try:
        learner = RobotLearner(lesson)
        learner.run(is_over)
        found: Any = learner.about()
    except (ConnectionError, EOFError):
        raise
    except Exception as error:
        found = Failure.of(error)
    connection.send(found)


def _step_back(threads: int) -> None:
    """Leave the machine to the loop: the last cores, and those only while nobody else wants them."""
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > threads:
            os.sched_setaffinity(0, cores[-threads:])

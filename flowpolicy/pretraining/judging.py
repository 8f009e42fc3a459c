"""How a run judges its policy: by rollouts in the task's simulator, or open loop on held-out episodes."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.store import Demonstrations
from flowpolicy.evaluation.open_loop import (
    HOLD,
    NEAREST,
    OpenLoopResult,
    evaluate_open_loop,
    usable_episodes,
)
from flowpolicy.evaluation.result import EvaluationResult
from flowpolicy.evaluation.rollout import check_spaces, evaluate
from flowpolicy.evaluation.task import Task
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.config import TrainConfig

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """What says how good a policy is."""

    def announce(self) -> None:
        """Say how, where it is not as anyone expects."""
        ...

    def on_the_way(self, policy: FlowPolicy) -> dict[str, float]:
        """Scalars for the log, during training."""
        ...

    def at_the_end(self, policy: FlowPolicy, run_dir: Path) -> tuple[dict[str, Any], dict[str, float]]:
        """The summary's metrics, and scalars for the log; what there is to look at is left in ``run_dir``."""
        ...


class Rollouts:
    """Whole episodes in the task's environment.

    Args:
        task: with an environment.
        config: how many episodes.
        record: how many of the last ones are recorded.

    Raises:
        TaskError: the environment cannot be made, or does not fit the policy.
    """

    def __init__(self, policy: FlowPolicy, task: Task, config: TrainConfig, record: int) -> None:
        self._task, self._config, self._record = task, config, record
        with contextlib.closing(task.make()) as environment:
            check_spaces(environment, policy, f"Task '{task.name}'")

    def announce(self) -> None:
        """Rollouts are what is expected."""

    def on_the_way(self, policy: FlowPolicy) -> dict[str, float]:
        """Scalars of ``evaluate_episodes``."""
        return self._rollouts(policy, self._config.evaluate_episodes, None).scalars()

    def at_the_end(self, policy: FlowPolicy, run_dir: Path) -> tuple[dict[str, Any], dict[str, float]]:
        """Figures of ``final_episodes``; ``video.mp4``."""
        video = run_dir / "video.mp4" if self._record else None
        outcome = self._rollouts(policy, self._config.final_episodes, video)
        return outcome.metrics(), outcome.scalars()

    def _rollouts(self, policy: FlowPolicy, episodes: int, video: Path | None) -> EvaluationResult:
        return evaluate(
            policy, self._task, episodes=episodes, num_envs=self._config.num_envs, record=self._record,
            video=video,
        )  # fmt: skip


class OpenLoop:
    """Held-out recorded episodes; see :mod:`flowpolicy.evaluation.open_loop`.

    Args:
        task: without an environment.
        demos: the recording.
        training: episodes that are trained on.
        held_out: the others.
        learnt: the steps that are learnt; None: all.
        seed: of the noise.

    Raises:
        DataError: the episodes that are held out are too short.
    """

    def __init__(
        self,
        task: Task,
        demos: Demonstrations,
        training: list[int],
        held_out: list[int],
        learnt: NDArray[np.bool_] | None,
        seed: int,
    ) -> None:
        self._task, self._demos, self._learnt, self._seed = task, demos, learnt, seed
        self._training = training
        self._held_out = usable_episodes(demos, held_out, learnt) if held_out else []

    def announce(self) -> None:
        """In one line, that it is open loop."""
        count = len(self._held_out)
        episodes = f"{count} held-out episode{'s' if count > 1 else ''}"
        logger.info(
            "Task '%s' has no simulator (env_id is null): the policy is evaluated open loop, %s.",
            self._task.name,
            f"against what was recorded in {episodes}"
            if count
            else "and not at all here, as no episode is held out (data.validation_fraction)",
        )

    def on_the_way(self, policy: FlowPolicy) -> dict[str, float]:
        """Scalars of all held-out episodes."""
        return self._evaluated(policy).scalars() if self._held_out else {}

    def at_the_end(self, policy: FlowPolicy, run_dir: Path) -> tuple[dict[str, Any], dict[str, float]]:
        """Figures of all held-out episodes; ``open_loop.csv`` and two plots."""
        if not self._held_out:
            return {"open_loop": None}, {}
        from flowpolicy.plots.open_loop import plot_errors, plot_trajectories

        result = self._evaluated(policy)
        logger.info("%s", result.sentence())
        for method, words in ((HOLD, "holding the last action"), (NEAREST, "the nearest neighbour")):
            if result.error() >= result.error(method):
                logger.warning(
                    "On these episodes the policy predicts no better than %s does; train longer, or look at "
                    "the recording with flowpolicy inspect-demos.",
                    words,
                )
        style: dict[str, Any] = {
            "control_hz": self._task.control_hz, "title": f"{self._task.name}, {policy.spec.name}",
        }  # fmt: skip
        plot_trajectories(result, run_dir / "open_loop.png", **style)
        plot_errors(result, run_dir / "open_loop_errors.png", **style)
        result.write_csv(run_dir / "open_loop.csv")
        return result.metrics(), result.scalars()

    def _evaluated(self, policy: FlowPolicy) -> OpenLoopResult:
        return evaluate_open_loop(
            policy, self._demos, self._held_out, self._training, learnt=self._learnt, seed=self._seed
        )

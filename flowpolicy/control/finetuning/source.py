"""A policy that is learnt while it acts: the source of a control run, and how newer weights come in."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.finetuning.config import RobotFinetuningConfig
from flowpolicy.control.finetuning.learner import CHECKPOINT, Lesson, serve
from flowpolicy.control.inference import Request
from flowpolicy.control.inference_hosts import Build
from flowpolicy.control.policy_inference import PolicyInference
from flowpolicy.control.robot import Robot
from flowpolicy.errors import FlowPolicyError
from flowpolicy.files.reading import stored_tensors
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.worker_process import Failure, WorkerDiedError, WorkerProcess

log = logging.getLogger(__name__)

RENEWED_S = 0.2
"""Between two looks for newer weights."""
START_S, CLOSE_S = 600.0, 120.0
"""Longest waits for a learner: until the first policy is there (it may learn from demonstrations before
that), and until it has saved everything at the end."""
PRELOAD = ("flowpolicy.control.finetuning.learner",)
"""What the learner's process needs, imported once."""
RESTARTS = 5
"""Of a learner whose process ended, in a session; one more ends it."""


@dataclass(frozen=True)
class LearningInferenceBuilder:
    """Builds a :class:`LearningInference` where it will run.

    Attributes:
        deployed: the sampler of the newest checkpoint.
        seed: of everything random.
    """

    deployed: DeployedSampler
    seed: int

    def __call__(self) -> LearningInference:
        """The function."""
        return LearningInference(self.deployed, self.seed)


class LearningInference(PolicyInference):
    """Acts with exploration by the newest weights of a checkpoint that is written again and again.

    A thread reads them; they are taken over between two requests, so that a chunk comes from one version.
    """

    def __init__(self, deployed: DeployedSampler, seed: int) -> None:
        torch.set_num_threads(deployed.threads)
        torch.manual_seed(seed)
        folder = Path(deployed.checkpoint)
        self._file, self._seen = folder / "model.safetensors", _stamp(folder / "model.safetensors")
        self._policy = FlowPolicy.load(folder, resolve_device(deployed.device))
        assert self._policy.steering is not None
        self._policy.steering.explores = True
        self._newer: dict[str, torch.Tensor] | None = None
        self._closed = False
        super().__init__(self._policy, seed)  # a sampler keeps the weights that it was built with
        threading.Thread(target=self._renew, daemon=True, name="newer weights").start()

    def __call__(self, request: Request) -> NDArray[Any]:
        """See :class:`PolicyInference`."""
        newer, self._newer = self._newer, None
        if newer is not None:
            self._policy.load_state_dict(newer)
        return super().__call__(request)

    def close(self) -> None:
        """No more requests come."""
        self._closed = True

    def _renew(self) -> None:
        while not self._closed:
            time.sleep(RENEWED_S)
            with suppress(OSError, FlowPolicyError):  # it is being exchanged; the next look will find it
                if (stamp := _stamp(self._file)) != self._seen:
                    self._newer, self._seen = stored_tensors(self._file).read(), stamp


def _stamp(file: Path) -> int:
    return file.stat().st_mtime_ns


class LearningPolicy:
    """The policy of a run that fine-tunes it; see :class:`~flowpolicy.control.policy_source.PolicySource`.

    The learner is a process. Where that is killed it is started again, and goes on from what it saved, while
    the robot goes on with the weights at hand. Where it fails the loop ends, with the robot's safe action.

    Args:
        config: the settings.
        run_dir: of the run.
        session: number of this part of the run.
        policy: the pretrained one, for the shapes.
    """

    plan: ClassVar[None] = None

    def __init__(
        self, config: RobotFinetuningConfig, run_dir: Path, session: int, policy: FlowPolicy
    ) -> None:
        self.name, self.policy = config.checkpoint, policy
        self._config, self._run_dir, self._session = config, run_dir, session
        self._learner: WorkerProcess | None = None
        self._found: dict[str, Any] = {}
        self._failure: Failure | None = None
        self._restarts = 0
        self._closing = threading.Event()
        self._stop: Callable[[str], None] = lambda reason: None
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="learner watch")

    def adopt(self, robot: Robot) -> FlowPolicy:
        """Start the learner, and take what it begins with.

        Raises:
            FlowPolicyError: it cannot be started.
        """
        lesson = Lesson(self._config, self._run_dir, robot.spec.action_low, robot.spec.action_high)
        learner = WorkerProcess(serve, (lesson,), name="learner", preload=PRELOAD)
        learner.start()
        try:
            _await_start(learner)
        except BaseException:
            learner.stop(0.0)
            raise
        self._learner = learner
        return FlowPolicy.load(self._run_dir / CHECKPOINT)

    def builders(self) -> tuple[Build, Build | None]:
        """See :class:`~flowpolicy.control.policy_source.PolicySource`."""
        config = self._config
        deployed = DeployedSampler(
            checkpoint=str(self._run_dir / CHECKPOINT), device=config.device, threads=config.threads
        )
        return LearningInferenceBuilder(deployed, config.seed + self._session), None

    def watch(self, stop: Callable[[str], None]) -> None:
        """See :class:`~flowpolicy.control.policy_source.PolicySource`."""
        self._stop = stop
        self._watcher.start()

    def about(self) -> dict[str, Any]:
        """How far the learner has come, after :meth:`close`."""
        return {
            "checkpoint": self.name, "algorithm": self._config.algorithm.get("name"),
            "session": self._session, "reward": self._config.reward,
            "learner": {**self._found, "restarts": self._restarts},
        }  # fmt: skip

    def close(self) -> None:
        """Let the learner take the last episodes, and save.

        Raises:
            FlowPolicyError: it failed.
        """
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        if self._learner is None:
            return
        learner, self._learner = self._learner, None
        try:
            if self._failure is None:
                learner.send(None)
                message = None
                while message is None and learner.poll(CLOSE_S):  # it may only just have started again
                    message = learner.receive()
                self._take(message)
                if message is None:
                    log.error("The learner did not end; resume=true goes on from what it saved.")
        except WorkerDiedError:
            log.error("The learner's process ended; resume=true goes on from what it saved.")
        learner.stop()
        if self._failure is not None:
            self._failure.raise_here()

    def _watch(self) -> None:
        learner = self._learner
        assert learner is not None
        while not self._closing.is_set() and self._failure is None:
            try:
                if learner.poll(0.25):
                    self._take(learner.receive())
            except WorkerDiedError:
                self._restarts += 1
                if self._restarts > RESTARTS:
                    self._stop(f"the learner's process ended {self._restarts} times")
                    return
                log.warning("The learner's process ended; it is started again, from what it saved.")
                learner.start()

    def _take(self, message: Any) -> None:
        if isinstance(message, Failure):
            self._failure = message
            self._stop(f"the learner failed: {message.sentence}")
        elif message is not None:
            self._found = message


def _await_start(learner: WorkerProcess) -> None:
    try:
        if not learner.poll(START_S):
            raise FlowPolicyError(f"The learner was not ready after {START_S:g} s.")
        message = learner.receive()
    except WorkerDiedError as error:
        raise FlowPolicyError("The learner's process ended while it started.") from error
    if isinstance(message, Failure):
        message.raise_here()

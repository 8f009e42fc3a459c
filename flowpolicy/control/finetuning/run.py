"""A session of fine-tuning on a robot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowpolicy.control.finetuning.config import RobotFinetuningConfig
from flowpolicy.control.finetuning.learner import CHECKPOINT, EPISODES, SESSIONS
from flowpolicy.control.finetuning.rewards import reward_function
from flowpolicy.control.finetuning.source import LearningPolicy
from flowpolicy.control.operator import Operator
from flowpolicy.control.robot import Robot
from flowpolicy.control.run import ControlRun, run_control
from flowpolicy.data.recording import recover
from flowpolicy.errors import FlowPolicyError
from flowpolicy.files.reading import read_json
from flowpolicy.finetuning.offpolicy.algorithms import build_algorithm
from flowpolicy.finetuning.recorder import STATE_FILE
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.run_folder import ROBOT, RunFolder, default_settings, refuse_other_settings
from flowpolicy.settings import require


def finetune_robot(
    config: RobotFinetuningConfig,
    run_dir: Path,
    command: str = "",
    env: Mapping[str, Any] | None = None,
    robot: Robot | None = None,
    operator: Operator | None = None,
) -> ControlRun:
    """Control a robot while a learner beside the loop fine-tunes the policy.

    ``run_dir`` holds the newest policy (``checkpoint``), what a later session goes on from, ``metrics.csv``
    with a row for each episode, and a folder for each session with its recorded episodes and what
    :func:`~flowpolicy.control.run.run_control` writes. Nothing of an episode that has ended is lost, whatever
    ends the session.

    Args:
        config: the settings.
        run_dir: of the run; with ``config.resume`` one that has begun.
        command: that made the run, for the summary.
        env: the task, where it is not the checkpoint's.
        robot: as :func:`~flowpolicy.control.run.run_control` takes it.
        operator: likewise.

    Raises:
        FlowPolicyError: a setting, the checkpoint, the robot or a saved state is not usable, or the learner
            failed, as it does of a reward that is not finite.
    """
    require(config.record is None, "record", config.record, "left out: the run's folder has the recordings")
    algorithm = build_algorithm(config.algorithm)
    reward_function(config.reward)
    folder = RunFolder(run_dir, ROBOT, state=STATE_FILE, result=CHECKPOINT)
    settings = config.learning()
    is_resumed = folder.continues(resume=config.resume)
    if is_resumed:
        defaults = default_settings(config, algorithm=algorithm)
        refuse_other_settings(run_dir, read_json(run_dir / "config.json"), settings, defaults)
        policy = FlowPolicy.load(run_dir / CHECKPOINT)
    else:
        policy = FlowPolicy.load(config.checkpoint)
        policy.require_unsteered("Fine-tuning on a robot")
        folder.begin(settings)
    sessions = sorted((run_dir / SESSIONS).glob("*"))
    for session in sessions:
        if not (session / EPISODES).exists():  # it was killed, or left none
            recover(session / EPISODES)
    number = len(sessions)
    session = run_dir / SESSIONS / f"{number:03d}"
    session.mkdir(parents=True)
    source = LearningPolicy(config, run_dir, number, policy)
    control = replace(config, record=str(session / EPISODES))
    try:
        return run_control(control, session, command, env, robot=robot, operator=operator, source=source)
    except FlowPolicyError:
        # Refused before the first tick: the corrected command is to find nothing of it.
        if not any(session.iterdir()):
            session.rmdir()
            if not is_resumed:
                folder.take_back(SESSIONS)
        raise

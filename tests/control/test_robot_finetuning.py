"""Fine-tuning on a robot: rewards of recorded episodes, the learner, and how its weights reach the robot."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from control_toys import A
from forked_runs import report_of

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.events import EventLog
from flowpolicy.control.finetuning.config import RobotFinetuningConfig
from flowpolicy.control.finetuning.learner import CHECKPOINT, EPISODES, SESSIONS, Lesson, RobotLearner
from flowpolicy.control.finetuning.rewards import reward_function, rewarded
from flowpolicy.control.finetuning.run import finetune_robot
from flowpolicy.control.finetuning.source import LearningInference
from flowpolicy.control.inference import Request
from flowpolicy.control.recorder import Recorder
from flowpolicy.data import recording
from flowpolicy.data.recording import num_recorded, recorded_episodes
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features import features_of
from flowpolicy.models.config import MLPConfig
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.runs.loggers import read_metrics
from flowpolicy.settings import build

BOUNDS = np.full(A, -1, np.float32), np.full(A, 1, np.float32)


def recorder(path):
    return Recorder(path, features_of({"observation": (2,)}), EventLog())


def episode(to, length, total, *, each=1.0, **end):
    """Record an episode whose every command is worth ``each``; all rewards so far, after it."""
    for tick in range(length):
        to.step(tick, {"observation": np.full(2, tick / 10, np.float32)}, np.zeros(A, np.float32), 0, total)
        total += each
    to.end_episode(end.pop("success", None), total, **end)
    return total


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_row_has_the_reward_that_followed_it_and_the_last_one_the_end(tmp_path):
    to = recorder(tmp_path / "run")
    total = episode(to, 3, 7.0, terminated=True)
    episode(to, 2, total + 5.0, each=2.0)  # what came between two episodes belongs to none
    until(lambda: num_recorded(tmp_path / "run") == 2)
    growing = recorded_episodes(tmp_path / "run")
    episode(to, 2, 0.0, success=True)
    assert to.close() == tmp_path / "run"
    whole = recorded_episodes(tmp_path / "run")
    for demos, count in ((growing, 2), (whole, 3)):
        assert demos.num_episodes == count
        assert demos.arrays["reward"][:5].tolist() == [1, 1, 1, 2, 2]
        assert demos.arrays["terminated"][:5].tolist() == [False, False, True, False, False]
    later = recorded_episodes(tmp_path / "run", 2)
    assert (later.num_steps, later.masks) == (2, {"success": [0]})
    assert recorded_episodes(tmp_path / "run", 3) is None
    assert recorded_episodes(tmp_path / "nothing") is None


def test_a_recording_may_be_finished_while_it_is_read(tmp_path, monkeypatch):
    to = recorder(tmp_path / "run")
    episode(to, 2, 0.0)
    until(lambda: num_recorded(tmp_path / "run") == 1)
    own = recording.import_zarr
    monkeypatch.setattr(recording, "import_zarr", lambda: (to.close(), own())[1])
    assert recorded_episodes(tmp_path / "run") is None
    assert recorded_episodes(tmp_path / "run").num_episodes == 1


def own_reward(rows):
    return -rows["observation"][:, 0]


def wrong_reward(rows):
    return rows["observation"]


@pytest.mark.parametrize("tells", [False, True])
def test_rewards_come_from_the_robot_a_judgement_or_a_function(tells):
    arrays = {"observation": np.ones((6, 2), np.float32), "action": np.zeros((6, A), np.float32)}
    if tells:
        arrays |= {"reward": np.arange(6, dtype=np.float32), "terminated": np.arange(6) == 5}
    demos = Demonstrations(arrays, np.array([2, 4, 6]), {"masks": {"success": [0], "failure": [1]}})
    found = rewarded(demos, "success").arrays
    assert found["reward"].tolist() == [0, 1, 0, 0, 0, 0]
    # What the robot does not call a terminal state was a time limit, unless it succeeded.
    assert np.flatnonzero(found["terminated"]).tolist() == ([1, 5] if tells else [1, 3])
    assert rewarded(demos, f"{__name__}:own_reward").arrays["reward"].tolist() == [-1] * 6
    with pytest.raises(DataError, match=r"shape \(2, 2\) for an episode of 2 rows"):
        rewarded(demos, f"{__name__}:wrong_reward")
    if tells:
        assert rewarded(demos, "robot") is demos
    else:
        with pytest.raises(ConfigError, match="reward=success"):
            rewarded(demos, "robot")
    with pytest.raises(ConfigError, match="cannot be imported"):
        reward_function("succes")


@pytest.fixture
def lesson(tmp_path):
    torch.manual_seed(0)
    policy = PolicyConfig({"name": "flow_matching"}, MLPConfig(hidden=8), {"observation": (2,)}, A, 1, 4, 4)
    FlowPolicy(policy).save(tmp_path / "base")
    settings = {
        "checkpoint": str(tmp_path / "base"), "num_steps": 1, "device": "cpu",
        "algorithm": {"name": "dsrl", "proposals": 2, "actor_hidden": [8]},
        "offpolicy": {
            "learning_starts": 15, "batch_size": 8, "members": 2, "critic_hidden": [8], "utd": 2,
        },
    }  # fmt: skip
    return Lesson(build(RobotFinetuningConfig, settings, ""), tmp_path / "run", *BOUNDS)


def learn(lesson):
    learner = RobotLearner(lesson)
    first = iter([False])
    learner.run(lambda seconds: next(first, seconds > 0))  # until there is nothing to learn
    return learner


def test_a_learner_takes_every_episode_once_and_goes_on_from_what_it_saved(lesson):
    store = lesson.run_dir / SESSIONS / "000" / EPISODES
    to = recorder(store)
    total = episode(to, 9, 0.0, success=True)
    total = episode(to, 3, total)  # shorter than a chunk: nothing is learnt from it
    until(lambda: num_recorded(store) == 2)
    first = RobotLearner(lesson)
    first.run(lambda seconds: first.model.iteration == 2)
    assert first.about()["steps"] == 12
    assert first.model.learner.updates == 0  # 15 steps are waited for
    assert len(first.model.replay_buffer.state()["chunk"]) == 5  # at each step that four follow
    episode(to, 12, total)
    to.close()
    later = learn(lesson)
    assert later.about()["steps"] == 24
    assert later.about()["episodes"] == 3
    assert later.about()["updates"] == 12  # two for each four steps
    again = learn(lesson)
    assert again.about()["updates"] == 12
    assert FlowPolicy.load(lesson.run_dir / CHECKPOINT).spec.metadata["finetuned_steps"] == 24
    # The n-step targets follow the episode by T_e steps, and end where it does.
    kept = again.model.replay_buffer
    assert kept.stride == 4
    assert kept.rows["is_last"][:5].tolist() == [False, True, True, True, True]
    assert kept.rows["succeeded"][: kept.size()].tolist() == [True] * 5 + [False] * (kept.size() - 5)


def test_a_reward_that_is_not_finite_is_one_sentence_and_loses_nothing(lesson):
    to = recorder(lesson.run_dir / SESSIONS / "000" / EPISODES)
    total = episode(to, 9, 0.0)
    to.close()
    learn(lesson)
    to = recorder(lesson.run_dir / SESSIONS / "001" / EPISODES)
    episode(to, 9, total, each=float("nan"))
    to.close()
    with pytest.raises(DataError, match="'reward' is not finite at step 0"):
        learn(lesson)
    assert RobotLearner(lesson).about()["steps"] == 9


def test_newer_weights_come_in_between_two_chunks_and_noise_is_explored(lesson):
    learn(lesson)
    folder = lesson.run_dir / CHECKPOINT
    inference = LearningInference(DeployedSampler(checkpoint=str(folder), device="cpu"), seed=0)
    request = Request(0, {"observation": np.zeros((1, 2), np.float32)})
    assert not np.array_equal(inference(request), inference(request))
    policy = FlowPolicy.load(folder)
    policy.action_normalizer.center.fill_(9.0)
    policy.save(folder)
    until(lambda: inference._newer is not None)
    assert (inference(request) > 5).all()
    inference.close()


def test_what_a_learning_policy_cannot_be_is_refused(lesson, tmp_path):
    for changes, words in (
        ({"backend": "onnx"}, "eager"), ({"policy_server": "ws://x", "checkpoint": ""}, "policy_server"),
        ({"dry_run": True}, "nothing to learn"), ({"plan": "x"}, "plan"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            build(RobotFinetuningConfig, {"checkpoint": "x", **changes}, "")
    with pytest.raises(ConfigError, match="recordings"):
        finetune_robot(build(RobotFinetuningConfig, {"checkpoint": "x", "record": "y"}, ""), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked, which this system cannot")
def test_a_session_survives_its_learner_and_a_run_its_sessions(forking_python, tmp_path):
    report = report_of(forking_python, Path(__file__).with_name("forked_robot_finetuning.py"), tmp_path)
    assert not report["left"]
    assert report["before"] >= 4  # of which the learner that was killed had seen at most two
    assert report["saved"] == report["episodes"] >= report["before"] + 2
    assert report["stopped"] == "interrupted by SIGTERM"
    assert report["last"] == [0.5]  # the safe action
    episodes = [row["rollout/length"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert len(episodes) == report["episodes"]
    assert sum(episodes) == report["steps"]
    # Those that had ended and were not learnt from when all was killed were taken from the recording.
    stores = [tmp_path / "run" / SESSIONS / name / EPISODES for name in ("000", "001")]
    assert sum(num_recorded(store) for store in stores) == report["episodes"]


def test_the_scripts_settings_are_read():
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    words = ["checkpoint=x", "reward=success", "algorithm=expo", "operator=keyboard"]
    with hydra.initialize_config_module("flowpolicy_configs", version_base="1.3"):
        composed = hydra.compose("finetune_robot", overrides=[*words, "run_dir=y"])
    config = OmegaConf.to_container(composed, resolve=True)
    config = {key: value for key, value in config.items() if key not in ("env", "run_dir")}
    found = build(RobotFinetuningConfig, config, "")
    assert (found.reward, found.algorithm["name"], found.video) == ("success", "expo", False)
    assert found.learning().keys() >= {"algorithm", "offpolicy", "reward", "control"}

"""robosuite's tasks: episodes by seed, kinds of actions, images, recordings, scripts that solve them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowpolicy.data.importers import import_demonstrations
from flowpolicy.data.robomimic_writing import write_robomimic
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError, TaskError
from flowpolicy.evaluation.rendering import choose_gl_backend
from flowpolicy.evaluation.task import Task

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("robosuite", reason="robosuite is not installed (extra 'robomimic')")
pytest.importorskip("robomimic", reason="robomimic is not installed (extra 'robomimic')")

from flowpolicy_envs.arm_scripts import Pose  # noqa: E402
from flowpolicy_envs.robosuite_experts import (  # noqa: E402
    CanExpert,
    LiftExpert,
    SquareExpert,
)
from flowpolicy_envs.rotations import axis_angle_from_matrix  # noqa: E402
from flowpolicy_envs.scripted import Attempt, play  # noqa: E402

pytestmark = pytest.mark.usefixtures("models_compiled_once")
ENV_ID = "flowpolicy_envs:flowpolicy/Robosuite-v0"
# robosuite 1.4's way to say it, as in the env_args of robomimic's files
OLD_CONTROLLER = {
    "type": "OSC_POSE",
    "control_delta": False,
    "damping": 1,
    "kp": 150,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
}


def _make(env_name: str = "Lift", limit: int = 150, controller: Any = None, **options: Any) -> Any:
    env_kwargs = {"robots": "Panda", "control_freq": 20}
    if controller is not None:
        env_kwargs["controller_configs"] = controller
    env_args = {"env_name": env_name, "type": 1, "env_kwargs": env_kwargs}
    return gymnasium.make(ENV_ID, env_args=env_args, max_episode_steps=limit, **options)


@pytest.fixture(scope="module")
def lift(models_compiled_once: None) -> Any:
    env = _make()
    yield env
    env.close()


@pytest.fixture(scope="module")
def lifted(lift: Any) -> Attempt:
    return play(lift, LiftExpert(), seed=1)


def _episode(env: Any, seed: int, steps: int = 12) -> np.ndarray:
    """All observations of an episode of random actions, ``(steps, n)``."""
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        rows.append(np.concatenate([observation[key] for key in sorted(observation)]))
        observation, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
    return np.stack(rows)


def test_an_episode_depends_on_its_seed_alone(lift: Any) -> None:
    first = _episode(lift, 5)
    other = _episode(lift, 6)
    np.random.seed(123)  # noqa: NPY002 - whatever a user's code leaves there must not matter
    again = _episode(lift, 5)
    fresh = _make()
    elsewhere = _episode(fresh, 5)
    fresh.close()
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(elsewhere, first)
    assert np.abs(other[0] - first[0]).max() > 1e-3


def test_what_is_seen_and_when_an_episode_ends(lift: Any, lifted: Attempt) -> None:
    observation, info = lift.reset(seed=0)
    assert lift.observation_space.contains(observation)
    assert {"object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"} <= set(observation)
    assert info["success"] is False
    episode = lifted.episode
    assert episode.success
    assert episode.terminated
    assert episode.reward.tolist() == [0.0] * (len(episode) - 1) + [1.0]


def test_absolute_targets_repeat_what_displacements_did(lift: Any, lifted: Attempt) -> None:
    envs = [_make(actions="absolute"), _make(controller=OLD_CONTROLLER, rotation_6d=True)]
    for env in (lift, *envs):
        env.reset(seed=1)
    worst = 0.0
    for action in lifted.episode.action:
        seen, *_ = lift.step(action)
        goal = _sent_to(lift)
        steps = [env.step(env.unwrapped.command(goal, action[-1])) for env in envs]
        for repeated, *_ in steps:
            worst = max(worst, float(np.abs(seen["robot0_eef_pos"] - repeated["robot0_eef_pos"]).max()))
    assert [env.action_space.shape for env in envs] == [(7,), (10,)]
    assert all(info["success"] for *_, info in steps)
    assert worst < 1e-4  # m; targets are float32
    assert steps[1][0]["robot0_eef_rot6d"].shape == (6,)
    for env in envs:
        env.close()


def _sent_to(env: Any) -> Pose:
    """Where the arm's controller is heading."""
    controller = env.unwrapped.simulator.robots[0].part_controllers["right"]
    return Pose(np.array(controller.goal_pos), np.array(controller.goal_ori))


def test_a_command_moves_the_hand_to_where_it_says(lift: Any) -> None:
    lift.reset(seed=2)
    arm = lift.unwrapped
    goal = arm.hand.turned(0.3).at(arm.hand.position + np.array([0.02, -0.03, -0.02]))
    for _ in range(20):
        lift.step(arm.command(goal, -1.0))
    # The controller has no integral part: some millimetres of the 41 stay.
    assert np.linalg.norm(arm.hand.position - goal.position) < 0.01
    assert np.linalg.norm(axis_angle_from_matrix(goal.rotation @ arm.hand.rotation.T)) < 0.05


def test_scripts_solve_their_tasks_in_more_than_one_way(lift: Any) -> None:
    attempts = [play(lift, LiftExpert(), seed, noise=0.1) for seed in range(2)]
    assert all(attempt.episode.success for attempt in attempts)
    assert {attempt.way for attempt in attempts} == {"straight", "turned"}
    again = play(lift, LiftExpert(), 1, noise=0.1)
    np.testing.assert_array_equal(again.episode.action, attempts[1].episode.action)


@pytest.fixture(scope="module")
def nuts(models_compiled_once: None) -> Any:
    env = _make("NutAssemblySquare", limit=400)
    yield env
    env.close()


@pytest.mark.slow
def test_a_longer_script_solves_its_task(models_compiled_once: None) -> None:
    """The one of the nut is the next test."""
    env = _make("PickPlaceCan", limit=300)
    episode = play(env, CanExpert(), 0).episode
    assert episode.success
    assert len(episode) < 300
    env.close()


@pytest.mark.slow
def test_a_nut_that_slips_away_is_fetched_again(nuts: Any) -> None:
    """The fingers open while the nut is carried; the script goes back for it, and the task is solved."""
    env = nuts
    observation, _ = env.reset(seed=0)
    simulator = env.unwrapped.simulator
    body = simulator.obj_body_id[simulator.nuts[simulator.nut_id].name]
    expert = SquareExpert()
    expert.reset(env, np.random.default_rng(0))
    dropping, heights = 10, []
    terminated = truncated = False
    while not terminated and not truncated:
        action = expert.act(env, observation)
        heights.append(simulator.sim.data.body_xpos[body][2] - simulator.table_offset[2])
        if dropping > 0 and (dropping < 10 or heights[-1] > 0.12):
            action[-1] = -1.0
            dropping -= 1
        observation, _, terminated, truncated, _ = env.step(action)
    lifts = np.diff(np.array(heights) > 0.08).nonzero()[0]
    assert len(lifts) >= 3  # up, down, and up again
    assert terminated


def test_images_are_upright_and_without_shadows(lift: Any) -> None:
    if choose_gl_backend() is None:
        pytest.skip("no off-screen OpenGL works here")
    env = _make(cameras=["agentview"], image_size=64, render_mode="rgb_array")
    observation, _ = env.reset(seed=3)
    image = observation["agentview_image"]
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    assert env.observation_space.contains(observation)
    film = env.render()
    assert film.shape == (256, 256, 3)
    small = film.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - image).mean() < 6
    assert np.abs(small[::-1] - image).mean() > 20
    # The cube is the reddest thing in sight; higher up in the world is higher up in the picture.
    state = env.unwrapped.simulator.sim.get_state().flatten()
    state[12] += 0.1
    env.unwrapped.set_states(state)
    raised = env.unwrapped.observe()["agentview_image"]
    assert _row_of_red(raised) < _row_of_red(image) - 3
    blind = _make()  # another environment without cameras must not make this one blind
    assert "agentview_image" in env.step(np.zeros(7))[0]
    blind.close()
    bare, _ = lift.reset(seed=3)
    np.testing.assert_array_equal(observation["object"], bare["object"])  # cameras change nothing else
    env.close()


def _row_of_red(image: np.ndarray) -> float:
    red = image[..., 0].astype(int) - image[..., 1:].max(axis=-1)
    return float(np.argwhere(red > 60)[:, 0].mean())


def test_a_file_names_its_own_environment(demos: Demonstrations, tmp_path: Path) -> None:
    env_args = {
        "env_name": "Lift",
        "type": 1,
        "env_kwargs": {"robots": ["Panda"], "control_freq": 10, "controller_configs": OLD_CONTROLLER},
    }
    path = write_robomimic(tmp_path / "lift.hdf5", demos, env_args=env_args)
    env = gymnasium.make(ENV_ID, dataset=str(path), disable_env_checker=True)
    assert env.unwrapped.absolute
    assert env.unwrapped.dt == pytest.approx(0.1)
    env.reset(seed=0)
    env.close()


def test_human_recordings_replay_to_success(lift: Any, shared_data: Path) -> None:
    source = shared_data / "robosuite_lift_human" / "demo.hdf5"
    raw = import_demonstrations(source, keys=["observation"])
    kept = np.concatenate(
        [np.arange(end - 15, end) for end in raw.episode_ends]
    )  # recordings go on after success
    from flowpolicy_envs.robosuite_states import observe_lift

    seen = observe_lift({key: array[kept] for key, array in raw.arrays.items()})
    success = seen["reward"].reshape(raw.num_episodes, -1)
    assert success[:, -1].tolist() == [1.0, 1.0, 1.0]
    assert success[:, 0].tolist() == [0.0, 0.0, 0.0]
    # What is observed is what was recorded: time, 9 joints of arm and fingers, then the cube's position.
    np.testing.assert_allclose(seen["robot0_joint_pos"], raw.arrays["observation"][kept, 1:8], atol=1e-6)
    np.testing.assert_allclose(seen["object"][:, :3], raw.arrays["observation"][kept, 10:13], atol=1e-6)
    # An episode may start from any of them.
    started, _ = lift.reset(options={"states": raw.arrays["observation"][kept[0]]})
    np.testing.assert_allclose(started["robot0_joint_pos"], seen["robot0_joint_pos"][0], atol=1e-6)
    with pytest.raises(DataError, match="Simulator states are needed"):
        observe_lift({"action": raw.arrays["action"]})


def test_mistakes_are_named(lift: Any, tmp_path: Path) -> None:
    for options in ({}, {"env_args": {"env_name": "Lift"}, "dataset": "lift.hdf5"}):
        with pytest.raises(TaskError, match="give one of the two"):
            gymnasium.make(ENV_ID, **options)
    with pytest.raises(DataError, match="There is no file"):
        gymnasium.make(ENV_ID, dataset=str(tmp_path / "none.hdf5"))
    with pytest.raises(TaskError, match=r"env_name is 'Lfit'; robosuite has .*Lift, "):
        _make("Lfit")
    with pytest.raises(TaskError, match="choose the task and robot of the recording"):
        lift.reset(options={"states": np.zeros(7)})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robomimic.envs.env_robosuite", None)
    task = Task("lift", ENV_ID, {"env_args": {"env_name": "Lift"}})
    with pytest.raises(TaskError, match=r"pip install 'flowpolicy\[robomimic\]'"):
        task.make()

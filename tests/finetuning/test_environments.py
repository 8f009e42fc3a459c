"""Chunked environments: three ways to run them that must agree with a loop of env.step written out."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import threading
import time

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.finetuning import parallel_environments
from flowpolicy.finetuning.environments import LocalChunks
from flowpolicy.finetuning.parallel_environments import WorkerChunks
from flowpolicy.finetuning.stable_baselines3 import VecEnvChunks
from flowpolicy.runs.seeds import derived_seed

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test by its name

KEY = "observation"
FIELDS = ("rewards", "executed", "terminated", "truncated", "success", "restarted")


class Counter(gymnasium.Env):
    """Observes (steps, episode's draw, last action); length and kind of end follow from the seed.

    ``lengths`` are what an episode's length is drawn from. Every third length ends both ways at once.
    A first action entry above 1.5 sets off ``trick``.
    """

    def __init__(self, lengths=range(1, 12), trick=None, as_dict=False, ends=("term", "trunc", "both")):
        self.lengths, self.trick, self.as_dict, self.ends = list(lengths), trick, as_dict, ends
        box = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        pixels = spaces.Box(0, 255, (2, 2, 1), np.uint8)
        self.observation_space = spaces.Dict({"pose": box, "image": pixels, "time": box}) if as_dict else box
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)
        self.closed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.draw = self.np_random.normal()
        self.length = int(self.np_random.choice(self.lengths))
        self.end = self.ends[int(self.np_random.integers(len(self.ends)))]
        self.count, self.last = 0, 0.0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count, self.last = self.count + 1, float(action[1])
        reward = 0.1 * self.count + float(action[0])
        if self.trick is not None and action[0] > 1.5:
            return self._tricked()
        over = self.count >= self.length
        info = {"success": self.count == 2 and self.draw > 0}
        return self._observation(), reward, over and self.end != "trunc", over and self.end != "term", info

    def close(self):
        self.closed += 1

    def _observation(self):
        pose = np.array([self.count, self.draw, self.last])
        return {"pose": pose, "image": self._pixels(), "time": pose[:1]} if self.as_dict else pose

    def _pixels(self):
        return np.full((2, 2, 1), self.count, np.uint8)

    def _tricked(self):
        if self.trick == "nan reward":
            return self._observation(), np.nan, False, False, {}
        if self.trick == "inf observation":
            return np.array([0, np.inf, 1]), 0.0, False, False, {}
        if self.trick == "raise":
            raise PickyError("joint 3", "broke.")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still here")


class PickyError(Exception):
    """Cannot be unpickled: its arguments are not those of its constructor."""

    def __init__(self, part, verb):
        super().__init__(f"{part} {verb}")


class Narrow(Counter):
    """Takes smaller actions."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Reusing(Counter):
    """Hands out the same array every time."""

    def _observation(self):
        self.array = getattr(self, "array", np.zeros(3, np.float32))
        self.array[:] = self.count, self.draw, self.last
        return self.array


def local(makes, horizon=2, keys=(KEY,)):
    return LocalChunks([make() for make in makes], keys, horizon)


def workers(makes, horizon=2, keys=(KEY,)):
    return WorkerChunks(makes, 2, keys, horizon)


def vec_env(makes, horizon=2, keys=(KEY,)):
    return VecEnvChunks(dummy_vec_env(makes), keys, horizon, sample_rest=zeros)


def dummy_vec_env(makes):
    return pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv(list(makes))


def zeros(histories, rows):
    return np.zeros((len(rows), 3, 2))


def counters(number, **kwargs):
    return [lambda: Counter(**kwargs)] * number


@pytest.fixture
def opened():
    """Makes chunk environments and closes them."""
    envs = []

    def make(kind, makes, *args, **kwargs):
        envs.append(kind(makes, *args, **kwargs))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def chunks_for(number, calls, steps=3, dim=2, limit=1.4, seed=0):
    return np.random.default_rng(seed).uniform(-limit, limit, (calls, number, steps, dim)).astype(np.float32)


def by_hand(make, seed, chunks, horizon):
    """One environment, written out plainly: a dictionary per chunk, and the episodes."""
    env = make()
    first = env.reset(seed=seed)[0]
    history, answers, episodes = [first] * horizon, [], []
    ret, length, success = 0.0, 0, None
    for chunk in chunks:
        answer = {"rewards": np.zeros(len(chunk)), "executed": 0, "success": False, "restarted": False}
        for at, action in enumerate(chunk):
            bounded = np.clip(action, env.action_space.low, env.action_space.high)
            observation, reward, terminated, truncated, info = env.step(bounded)
            history = [*history, observation][1:]
            answer["rewards"][at] = reward
            answer["executed"] += 1
            answer["success"] |= bool(info.get("success"))
            ret, length = ret + reward, length + 1
            success = bool(success) | bool(info["success"]) if "success" in info else success
            if terminated or truncated:
                break
        answer["terminated"], answer["truncated"] = terminated, truncated and not terminated
        answer["final_observation"] = np.stack(history)
        if terminated or truncated:
            episodes.append((ret, length, success))
            ret, length, success = 0.0, 0, None
            history = [env.reset()[0]] * horizon
        answer["observation"] = np.stack(history)
        answers.append(answer)
    return answers, episodes


def assert_row(step, row, answer, names):
    for name in names:
        found = getattr(step, name)
        found = found[KEY] if isinstance(found, dict) else found
        np.testing.assert_array_equal(found[row], np.asarray(answer[name], found.dtype), err_msg=name)


def agree(env, makes, chunks, horizon, borders_only=False):
    """Every field of every call is that of the plain loop; how many episodes ended, and how many in a chunk.

    With ``borders_only`` an environment is compared up to its first end inside a chunk, and there in all
    fields but ``observation``.
    """
    number, ends, inside = len(makes), 0, 0
    seed = derived_seed(7, "environments")
    expected = [by_hand(make, seed + row, chunks[:, row], horizon) for row, make in enumerate(makes)]
    histories = env.reset(seed=7)
    for row, make in enumerate(makes):
        first = make().reset(seed=seed + row)[0]
        np.testing.assert_array_equal(histories[KEY][row], np.stack([first] * horizon).astype(np.float32))
    compared = set(range(number))
    for call, chunk in enumerate(chunks):
        step = env.step(chunk)
        assert step.rewards.dtype == step.observation[KEY].dtype == np.float32
        assert step.executed.dtype == np.int64
        for row in sorted(compared):
            answer = expected[row][0][call]
            ended = answer["terminated"] or answer["truncated"]
            mid = ended and answer["executed"] < chunk.shape[1]
            leave = borders_only and mid
            names = (*FIELDS, "final_observation", *(() if leave else ("observation",)))
            assert_row(step, row, answer, names)
            ends, inside = ends + ended, inside + mid
            if leave:
                compared.discard(row)
    if len(compared) == number:
        episodes = sorted((r.ret, r.length, r.success) for r in env.pop_episodes())
        wanted = sorted(itertools.chain.from_iterable(found for _, found in expected))
        assert [(n, s) for _, n, s in episodes] == [(n, s) for _, n, s in wanted]
        np.testing.assert_allclose([r for r, _, _ in episodes], [r for r, _, _ in wanted], rtol=1e-5)
        assert env.pop_episodes() == []
    return ends, inside


@pytest.mark.parametrize("kind", [local, workers, vec_env])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_all_agree_with_a_plain_loop(kind, horizon, opened):
    makes, chunks = counters(5), chunks_for(5, 12, limit=3.0)  # some actions are out of bounds
    ends, inside = agree(opened(kind, makes, horizon), makes, chunks, horizon, kind is vec_env)
    assert ends >= (5 if kind is vec_env else 20)
    assert inside >= 5


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_all_agree_where_episodes_end_with_a_chunk(kind, opened):
    makes, chunks = counters(4, lengths=[3, 6, 9]), chunks_for(4, 12)
    ends, inside = agree(opened(kind, makes), makes, chunks, 2)
    assert ends >= 20
    assert inside == 0


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_all_agree_on_a_simulator(kind, opened):
    pytest.importorskip("mujoco")
    makes = [lambda: gymnasium.make("Hopper-v5", max_episode_steps=30)] * 3
    env = opened(kind, makes)
    env.sample_rest = lambda _, rows: np.zeros((len(rows), 4, 3))
    ends, _ = agree(env, makes, chunks_for(3, 30, steps=4, dim=3), 2, kind is vec_env)
    assert ends >= 3


@pytest.mark.parametrize("kind", [local, workers, vec_env])
@pytest.mark.parametrize(
    ("end", "terminated", "truncated"),
    [("term", True, False), ("trunc", False, True), ("both", True, False)],
)
def test_an_end_is_of_one_kind_and_keeps_the_true_last_observation(
    kind, end, terminated, truncated, opened, request
):
    env = opened(kind, counters(2, lengths=[3], ends=[end]))
    start = env.reset(seed=1)[KEY]
    assert (start[:, 0] == start[:, 1]).all()
    step = env.step(np.full((2, 3, 2), 0.25))
    assert step.terminated.tolist() == [terminated] * 2
    assert step.truncated.tolist() == [truncated] * 2
    np.testing.assert_array_equal(step.final_observation[KEY][:, :, 0], [[2, 3]] * 2)
    np.testing.assert_array_equal(step.final_observation[KEY][:, :, 1], start[:, :, 1])
    np.testing.assert_array_equal(step.observation[KEY][:, :, 0], 0)  # a new episode, its first look twice
    np.testing.assert_array_equal(step.observation[KEY][:, 0], step.observation[KEY][:, 1])
    assert (step.observation[KEY][:, 0, 1] != start[:, 0, 1]).all()
    after = env.step(np.full((2, 3, 2), 0.25))
    np.testing.assert_array_equal(after.final_observation[KEY][:, :, 0], [[2, 3]] * 2)


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_dictionaries_keep_their_keys_and_dtypes(kind, opened):
    env = opened(kind, counters(2, lengths=[50], as_dict=True), keys=["image", "pose"])
    assert {key: value.shape for key, value in env.reset(seed=0).items()} == {
        "image": (2, 2, 2, 2, 1),
        "pose": (2, 2, 3),
    }
    found = env.step(np.zeros((2, 3, 2))).observation
    assert found.keys() == {"image", "pose"}
    assert (found["image"].dtype, found["pose"].dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(found["image"][0, :, 0, 0, 0], [2, 3])
    np.testing.assert_array_equal(found["pose"][0, :, 0], [2, 3])


def test_an_environment_that_reuses_its_array_and_a_caller_who_writes_into_his(opened):
    plain, reusing = (
        opened(local, [lambda make=make: make(lengths=[7])] * 2, 5) for make in (Counter, Reusing)
    )
    assert plain.reset(seed=3)[KEY] == pytest.approx(reusing.reset(seed=3)[KEY])
    for chunk in chunks_for(2, 6):
        step, other = plain.step(chunk), reusing.step(chunk)
        for name in ("observation", "final_observation"):
            np.testing.assert_array_equal(getattr(step, name)[KEY], getattr(other, name)[KEY])
        other.observation[KEY][:] = 99


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_nothing_that_is_not_finite_goes_on(kind, opened):
    good, bad = np.zeros((3, 3, 2)), np.zeros((3, 3, 2))
    bad[1, 1, 0] = 2.0
    for trick, sentence in (
        ("nan reward", r"^Environment 1 gave a reward with NaN .*; check the simulator"),
        ("inf observation", r"^Environment 1 gave an observation 'observation' with NaN or infinity; check"),
    ):
        env = opened(kind, counters(3, lengths=[50], trick=trick))
        env.reset(seed=0)
        env.step(good)
        with pytest.raises(FlowPolicyError, match=sentence):
            env.step(bad)
        with pytest.raises(FlowPolicyError, match=r"call reset\(\)"):
            env.step(good)
        env.reset(seed=0)
        np.testing.assert_array_equal(env.step(good).observation[KEY][:, -1, 0], 3)
    for value in (np.nan, np.inf):
        bad[2, 0, 1] = value
        with pytest.raises(
            FlowPolicyError, match=r"chunk for environment 2 has an action with NaN or inf.*;"
        ):
            env.step(bad)
    assert env.step(good).executed.tolist() == [3, 3, 3]  # refused before anything was executed


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_an_error_of_an_environment_is_one_sentence_with_its_cause(kind, opened):
    env = opened(kind, counters(3, lengths=[50], trick="raise"))
    env.reset(seed=0)
    chunk = np.zeros((3, 3, 2))
    chunk[2, 1, 0] = 2.0
    with pytest.raises(
        FlowPolicyError, match=r"nvironment.* raised PickyError: joint 3 broke; fix"
    ) as caught:
        env.step(chunk)
    if kind is not vec_env:
        assert str(caught.value).startswith("Environment 2 ")
    cause = caught.value.__cause__
    assert "PickyError" in f"{type(cause).__name__} {getattr(cause, '__notes__', '')}"
    env.reset(seed=0)
    assert env.step(np.zeros((3, 3, 2))).executed.tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_wrong_shapes_and_calls_out_of_turn_are_refused(kind, opened):
    env = opened(kind, counters(2))
    with pytest.raises(FlowPolicyError, match=r"call reset\(\)"):
        env.step(np.zeros((2, 3, 2)))
    env.reset()
    for shape in ((2, 3, 3), (3, 3, 2), (2, 2), (2, 0, 2)):
        with pytest.raises(FlowPolicyError, match=r"2 environments need \(2, T_e, 2\)"):
            env.step(np.zeros(shape))
    env.close()
    env.close()
    with pytest.raises(FlowPolicyError, match="closed"):
        env.reset()
    with pytest.raises(FlowPolicyError, match="closed"):
        env.step(np.zeros((2, 3, 2)))


@pytest.mark.parametrize("kind", [local, workers, vec_env])
def test_spaces_that_do_not_fit_are_refused(kind, opened):
    with pytest.raises(TaskError, match="no observation 'pose'"):
        opened(kind, counters(2), keys=["pose"])
    with pytest.raises(TaskError, match=r"actions Discrete\(2\)"):
        opened(kind, [lambda: gymnasium.make("CartPole-v1")] * 2)
    with pytest.raises(TaskError, match=r"gave 'time' of shape \(1,\).*says \(3,\)"):
        opened(local, counters(2, as_dict=True), keys=["time"]).reset()
    with pytest.raises(ConfigError, match="obs_horizon is 0"):
        opened(kind, counters(2), 0)


def test_environments_of_two_kinds_are_refused(opened):
    makes = [Counter, Narrow]
    for kind in (local, workers):
        with pytest.raises(TaskError, match="differ"):
            opened(kind, makes)


def test_local_environments_are_closed():
    envs = [Counter(), Counter()]
    chunks = LocalChunks(envs, [KEY], 1)
    chunks.close()
    chunks.close()
    assert [env.closed for env in envs] == [1, 1]


# Worker processes


def gone(pids, seconds=5.0):
    """Whether all these processes are gone, not even zombies, within a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):  # noqa: PTH110
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("moment", ["between calls", "inside a call"])
def test_a_killed_worker_is_replaced(moment, opened, caplog):
    env = opened(workers, counters(4, lengths=[50], trick="die"))
    env.reset(seed=0)
    before = env.step(np.full((4, 3, 2), 0.5)).observation[KEY]
    chunk, pids = np.zeros((4, 3, 2)), env.pids
    if moment == "between calls":
        os.kill(pids[1], signal.SIGKILL)
    else:
        chunk[3, 1, 0] = 2.0
    with caplog.at_level(logging.WARNING):
        step = env.step(chunk)
    assert step.restarted.tolist() == step.truncated.tolist() == [False, False, True, True]
    assert step.executed.tolist() == [3, 3, 0, 0]
    assert not step.terminated.any()
    assert not step.rewards[2:].any()
    np.testing.assert_array_equal(step.final_observation[KEY][2:], before[2:])
    np.testing.assert_array_equal(step.observation[KEY][2:, :, 0], 0)
    np.testing.assert_array_equal(step.observation[KEY][:2, :, 0], [[5, 6]] * 2)
    assert env.restarts == 1
    (record,) = caplog.records
    assert "environments 2 to 3 died (exit code -9)" in record.getMessage()
    after = env.step(np.zeros((4, 3, 2)))
    np.testing.assert_array_equal(after.observation[KEY][:, -1, 0], [9, 9, 3, 3])
    assert not after.restarted.any()
    assert env.pids[0] == pids[0]
    assert env.pids[1] != pids[1]


def test_replaced_environments_are_repeatable_and_not_the_ones_that_crashed(opened):
    draws = []
    for seed in (0, 0, 1):
        env = opened(workers, counters(2, lengths=[50]))
        start = env.reset(seed=seed)[KEY]
        os.kill(env.pids[0], signal.SIGKILL)
        draws.append([start[0, 0, 1], env.step(np.zeros((2, 3, 2))).observation[KEY][0, 0, 1]])
        os.kill(env.pids[0], signal.SIGKILL)
        draws[-1].append(env.step(np.zeros((2, 3, 2))).observation[KEY][0, 0, 1])
    assert draws[0] == draws[1]
    assert len({*draws[0], *draws[2]}) == 6


def test_a_worker_that_only_dies_is_given_up(opened, monkeypatch):
    assert parallel_environments.MAX_RESTARTS == 10
    monkeypatch.setattr(parallel_environments, "MAX_RESTARTS", 3)
    env = opened(workers, counters(2, lengths=[50], trick="die"))
    env.reset(seed=0)
    chunk = np.zeros((2, 1, 2))
    chunk[0] = 2.0
    for call in range(5):
        assert env.step(chunk).restarted.tolist() == [True, False]
        assert env.restarts == call + 1
        if call == 1:
            assert not env.step(0 * chunk).restarted.any()  # what lives is forgiven its deaths
    with pytest.raises(FlowPolicyError, match=r"environment 0 died 4 times in a row .*; run one"):
        env.step(chunk)
    env.reset(seed=0)
    assert env.step(chunk).restarted.tolist() == [True, False]
    assert env.step(0 * chunk).executed.tolist() == [1, 1]


def test_environments_that_cannot_be_made_are_one_sentence():
    with pytest.raises(
        FlowPolicyError, match=r"^Environment 1 cannot be made, it raised ZeroDivisionError: "
    ) as caught:
        workers([Counter, lambda: 1 / 0])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "Traceback" in caught.value.__cause__.__notes__[0]
    with pytest.raises(
        FlowPolicyError, match=r"environment 0 died with exit code -9 while making them; check"
    ):
        workers([lambda: os.kill(os.getpid(), signal.SIGKILL), Counter])


def test_closing_leaves_no_process_behind():
    env = workers(counters(4))
    env.reset()
    pids = env.pids
    env.close()
    assert gone(pids)


class Slow(Counter):
    def step(self, action):
        time.sleep(0.3)
        return super().step(action)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt; a shell that starts tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_workers_and_a_reset_starts_them_again(opened, interruptible):
    env = opened(workers, [lambda: Slow(lengths=[50])] * 2)
    env.reset(seed=0)
    pids = env.pids
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # a terminal sends it to them as well
    assert not env.step(np.zeros((2, 1, 2))).restarted.any()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        env.step(np.zeros((2, 3, 2)))
    timer.join()
    assert gone(pids)
    env.reset(seed=0)
    assert env.step(np.zeros((2, 1, 2))).executed.tolist() == [1, 1]
    assert env.restarts == 0


# Vectorised environments of stable-baselines3


def fails_then_succeeds(env):
    """A seed whose first episode is no success and whose second is one."""
    for seed in range(100):
        env.reset(seed=derived_seed(seed, "environments"))
        first = env.draw
        env.reset()
        if first < 0 < env.draw:
            return seed
    raise AssertionError("no such seed")


def test_a_vectorised_episode_that_ends_inside_a_chunk_is_followed_by_what_sample_rest_gives():
    asked = []

    def plan(histories, rows):
        asked.append((histories[KEY].copy(), rows.tolist()))
        return np.full((len(rows), 5, 2), 0.5)

    venv = dummy_vec_env([lambda: Counter(lengths=[2]), lambda: Counter(lengths=[50])])
    env = VecEnvChunks(venv, [KEY], 2, plan)
    env.reset(seed=fails_then_succeeds(Counter(lengths=[2])))
    step = env.step(np.zeros((2, 5, 2)))
    assert [rows for _, rows in asked] == [[0], [0]]  # it ended after 2 and after 4 of 5 steps
    np.testing.assert_array_equal(asked[0][0][0, :, 0], 0)  # of a new episode
    assert asked[0][0][0, 0, 1] != asked[1][0][0, 0, 1]
    assert step.executed.tolist() == [2, 5]
    np.testing.assert_allclose(step.rewards, [[0.1, 0.2, 0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(step.final_observation[KEY][:, :, 0], [[1, 2], [4, 5]])
    np.testing.assert_array_equal(step.observation[KEY][:, :, 0], [[0, 1], [4, 5]])
    np.testing.assert_array_equal(step.observation[KEY][:, -1, 2], [0.5, 0.0])
    assert env.unrecorded_steps == 3
    assert not step.success[0]
    episodes = env.pop_episodes()
    assert [record.success for record in episodes] == [False, True]
    assert [record.length for record in episodes] == [2, 2]
    np.testing.assert_allclose([record.ret for record in episodes], [0.3, 1.3], rtol=1e-6)
    env.sample_rest = None
    with pytest.raises(FlowPolicyError, match="set sample_rest"):
        env.step(np.zeros((2, 5, 2)))


def test_callbacks_see_every_primitive_step_and_can_stop():
    vec = pytest.importorskip("stable_baselines3.common.vec_env")
    env = VecEnvChunks(vec.VecMonitor(dummy_vec_env(counters(3, lengths=[2, 50]))), [KEY], 2, zeros)
    env.reset(seed=2)  # of three episodes some last 2 steps, some 50
    monitored, rewarded, calls = [], 0.0, 0

    def on_step(rewards, dones, infos):
        nonlocal rewarded, calls
        assert dones.tolist() == ["episode" in info for info in infos]
        monitored.extend(info["episode"] for info in infos if "episode" in info)
        rewarded, calls = rewarded + rewards.sum(), calls + 1
        return calls != 5

    env.on_step = on_step
    first = env.step(np.zeros((3, 3, 2)))
    assert not env.stopped
    second = env.step(np.zeros((3, 3, 2)))
    assert env.stopped
    assert calls == 5
    assert rewarded > 0
    running = ~(second.terminated | second.truncated)
    assert running.any()
    assert (second.executed[running] == 2).all()
    assert not second.rewards[:, 2].any()
    assert (first.terminated | first.truncated).any()
    records = env.pop_episodes()
    assert [record.length for record in records] == [episode["l"] for episode in monitored]
    np.testing.assert_allclose([r.ret for r in records], [e["r"] for e in monitored], rtol=1e-5)
    assert env.step(np.zeros((3, 3, 2))).executed[running].tolist() == [3] * running.sum()


def test_a_vectorised_environment_that_was_just_reset_is_taken_over():
    venv = dummy_vec_env(counters(2))
    env = VecEnvChunks(venv, [KEY], 3)
    observation = venv.reset()
    np.testing.assert_array_equal(
        env.start_from(observation)[KEY], np.repeat(observation[:, None], 3, 1).astype(np.float32)
    )
    assert env.step(np.zeros((2, 1, 2))).executed.tolist() == [1, 1]


def test_a_dead_process_of_a_vectorised_environment_is_one_sentence():
    vec = pytest.importorskip("stable_baselines3.common.vec_env")
    venv = vec.SubprocVecEnv(counters(1, lengths=[50], trick="die"))
    env = VecEnvChunks(venv, [KEY], 1)
    env.reset(seed=0)
    assert env.step(np.zeros((1, 2, 2))).executed.tolist() == [2]
    with pytest.raises(FlowPolicyError, match=r"process of the vectorised environment died; .*checkpoint"):
        env.step(np.full((1, 2, 2), 2.0))


@pytest.mark.parametrize("workers", [0, 2])
def test_environments_of_neighbouring_seeds_start_apart(workers):
    makes = [Counter] * 16
    if workers:
        envs = WorkerChunks(makes, workers, (KEY,), 1)
    else:
        envs = LocalChunks([make() for make in makes], (KEY,), 1)
    try:
        first, second, again = (
            {tuple(row.ravel().tolist()) for row in envs.reset(seed)[KEY]} for seed in (0, 1, 0)
        )
    finally:
        envs.close()
    assert len(first) == len(second) == 16
    assert not first & second
    assert again == first

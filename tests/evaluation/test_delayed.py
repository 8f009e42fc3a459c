"""Delayed inference in virtual time: streams worked out by hand, and evaluation without delay."""

import gymnasium
import numpy as np
import pytest
import torch
from control_toys import ToyClock, ToyPolicy, ToyRobot, ToyWorker

from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.loop import ControlLoop
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.evaluation.delayed import run_delayed
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.seams import smoothness
from flowpolicy.evaluation.task import Task
from flowpolicy.execution.fusion import prefix_weights
from flowpolicy.features import features_of
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.spec import PolicySpec

EXECUTED: dict[int, list[float]] = {}


class CountingEnv(gymnasium.Env):
    """Observes the number of its steps; what was executed is kept by seed."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1e4, 1e4, (1,), np.float32)

    def __init__(self, length=12, varied=False):
        self.length, self.varied = length, varied

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = float(self.np_random.normal()) if self.varied else 0.0
        self.limit = int(self.np_random.integers(4, 30)) if self.varied else self.length
        self.executed = EXECUTED[seed] = []
        return np.array([self.state]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.executed.append(float(action[0]))
        steps = len(self.executed)
        self.state = 0.9 * self.state + float(action[0]) / 10 if self.varied else steps
        info = {"success": steps == 5, "score": -abs(self.state)}
        return np.array([self.state]), float(action[0]), steps >= self.limit, False, info


gymnasium.register("CountingEnv-v0", CountingEnv, disable_env_checker=True, order_enforce=False)


class CountingPolicy:
    """Action k of a chunk sampled at observation c is 100 c + k; it keeps the prefixes it is given."""

    obs_horizon, device = 1, torch.device("cpu")

    def __init__(self, horizon=8):
        self.spec = PolicySpec(features_of({"observation": (1,)}), self.obs_horizon, horizon, horizon, 1)
        self.batches, self.prefixes = [], []

    def nfe(self, num_steps=None, solver=None):
        return num_steps or 1

    def act(self, observations, *, noise, num_steps=None, solver=None, prefix=None):
        self.batches.append(len(noise))
        self.prefixes.append(prefix)
        start = torch.as_tensor(observations["observation"])[:, -1:]
        return 100 * start + torch.arange(self.spec.action_horizon)[:, None]


class NoisyPolicy(CountingPolicy):
    """Depends on the history and the noise; it takes no prefix."""

    obs_horizon = 2

    def act(self, observations, *, noise, num_steps=None, solver=None):
        history = torch.as_tensor(observations["observation"])
        return noise - 0.3 * history[:, -1:] + 0.1 * history[:, :1]


def task(**env):
    return Task("counting", "CountingEnv-v0", env, action_horizon=8, execute_horizon=3)


def executed(strategy, delay, length=12, execute_horizon=3, horizon=8, **settings):
    run_delayed(
        CountingPolicy(horizon), task(length=length), strategy=strategy, delay=delay, episodes=1, seed=7,
        execute_horizon=execute_horizon, **settings,
    )  # fmt: skip
    return EXECUTED[7]


@pytest.mark.parametrize("strategy", ["switch", "rtc"])
@pytest.mark.parametrize(("delay", "safe", "expected"), [
    (0, "zero", [0, 1, 2, 300, 301, 302, 600, 601]),
    # The first chunk begins at its beginning; the next is asked for after three actions, at tick 5.
    (2, "zero", [0, 0, 0, 1, 2, 3, 4, 502, 503, 504, 802]),
    (2, [-5.0], [-5, -5, 0, 1, 2, 3, 4, 502, 503, 504, 802]),
    (2, "hold", [0, 1, 2, 3, 4, 302, 303, 304, 602]),
    # After T_e ticks without an action the next is asked for when this one has arrived.
    (4, "zero", [0, 0, 0, 0, 0, 1, 2, 3, 404, 405, 406, 407, 804]),
])  # fmt: skip
def test_the_previous_chunk_goes_on_until_the_next_arrives(strategy, delay, safe, expected):
    assert executed(strategy, delay, len(expected), safe_action=safe) == expected


@pytest.mark.parametrize(("delay", "safe", "expected"), [
    (0, "zero", [0, 1, 2, 300, 301, 302, 600]),
    (2, "zero", [0, 0, 0, 1, 2, 0, 0, 500, 501, 502, 0, 0, 1000]),
    (2, "hold", [0, 1, 2, 2, 2, 300, 301, 302, 302, 302, 800]),
])  # fmt: skip
def test_synchronous_inference_stands_still_and_begins_at_the_chunks_beginning(delay, safe, expected):
    assert executed("synchronous", delay, len(expected), safe_action=safe) == expected


def test_ensembling_takes_the_mean_of_overlapping_chunks():
    weight = np.exp(-0.01)
    mean = [(old + weight * new) / (1 + weight) for old, new in ((5, 502), (6, 503), (7, 504))]
    found = executed("ensemble", 2, 10, safe_action="zero")
    assert found == pytest.approx([0, 0, 0, 1, 2, 3, 4, *mean], abs=1e-3)


@pytest.mark.parametrize("strategy", ["switch", "ensemble", "rtc"])
@pytest.mark.parametrize(("delay", "execute_horizon"), [(1, 4), (2, 4), (3, 4), (4, 4), (2, 3), (4, 3)])
def test_it_executes_and_asks_for_what_the_control_loop_does(strategy, delay, execute_horizon):
    clock, ticks = ToyClock(), 30
    robot = ToyRobot(clock, bound=1e4)
    starts = []

    def plan(request):  # as CountingPolicy, from the tick of the observation
        starts.append(round((request.observation["observation"][-1, 0] - origin) / loop.period))
        return np.repeat(100 * starts[-1] + np.arange(8)[:, None], 2, 1).astype(np.float32)

    worker = ToyWorker(delay, plan)
    config = ControlConfig(fusion=strategy, execute_horizon=execute_horizon, priority=False, wait_share=0.0)
    loop = ControlLoop(robot, ToyPolicy(), worker, config, clock=clock)
    origin = clock.time + loop.period
    loop.run(ticks)
    policy = CountingPolicy()
    run_delayed(
        policy, task(length=ticks), strategy=strategy, delay=delay, execute_horizon=execute_horizon,
        safe_action="zero", episodes=1, seed=7,
    )  # fmt: skip
    assert EXECUTED[7] == [float(c[0]) for c in robot.commands[:ticks]]
    for request, prefix in zip(worker.requests, policy.prefixes, strict=True):
        assert (request.prefix is None) == (prefix is None)
        if prefix is not None:
            assert np.array_equal(request.prefix.actions[:, 0], prefix[0][0, :, 0])
            assert np.array_equal(request.prefix.weights, prefix[1][0])


def test_real_time_chunking_hands_over_the_rest_of_the_chunk():
    policy = CountingPolicy()
    result = run_delayed(
        policy, task(), strategy="rtc", delay=2, safe_action="zero", episodes=3, num_envs=2, seed=0
    )
    # Two episodes, then one: each asks at ticks 0, 5, 8 and 11, in one batch with its neighbours.
    assert policy.batches == [2, 2, 2, 2, 1, 1, 1, 1]
    assert result.chunks == 12
    assert policy.prefixes[0] is None
    actions, weights = policy.prefixes[1]
    assert actions[:, :, 0].tolist() == [[3, 4, 5, 6, 7, 0, 0, 0]] * 2
    assert np.array_equal(weights, [prefix_weights(8, 2, 5)] * 2)


def test_a_late_chunk_leaves_a_gap_that_safe_actions_fill():
    # T = 4, T_e = 2, delay 3: the chunk asked for at tick 3 has one action left when it arrives at tick 6.
    expected = [0, 0, 0, 0, 1, 2, 303, 0, 0, 601, 602, 603, 903]
    settings = {"length": 13, "execute_horizon": 2, "horizon": 4, "safe_action": "zero"}
    assert executed("switch", [3], **settings) == expected
    assert executed("switch", lambda generator: 3, **settings) == expected
    with pytest.raises(ConfigError, match="delay is 3"):
        executed("switch", 3, **settings)


@pytest.mark.parametrize("strategy", ["switch", "synchronous"])
@pytest.mark.parametrize("execute_horizon", [3, 8])
def test_without_delay_it_is_evaluation(strategy, execute_horizon):
    settings = {"episodes": 9, "seed": 3, "num_envs": 4, "num_steps": 2}
    task = Task(
        "counting", "CountingEnv-v0", {"varied": True}, action_horizon=8, execute_horizon=execute_horizon
    )
    expected = evaluate(NoisyPolicy(), task, show_progress=False, **settings)
    stream = {seed: list(actions) for seed, actions in EXECUTED.items()}
    found = run_delayed(NoisyPolicy(), task, strategy=strategy, delay=0, **settings)
    for name in ("seeds", "returns", "lengths", "success", "score", "nfe", "chunks"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert all(EXECUTED[seed] == stream[seed] for seed in range(3, 12))
    assert found.safe_ticks == 0
    assert found.success.any()
    assert not found.success.all()


def test_drawn_delays_belong_to_the_episode_whatever_runs_beside_it():
    streams = []
    for num_envs in (1, 5):
        run_delayed(
            NoisyPolicy(), task(varied=True), strategy="switch", delay=np.array([0, 1, 4]), episodes=6,
            seed=20, num_envs=num_envs, safe_action="zero",
        )  # fmt: skip
        streams.append({seed: list(EXECUTED[seed]) for seed in range(20, 26)})
    assert streams[0] == streams[1]
    assert len({stream.count(0.0) for stream in streams[0].values()}) > 1  # first chunks of several delays


def test_smoothness_by_hand():
    result = run_delayed(
        CountingPolicy(), task(length=11), strategy="switch", delay=2, safe_action="zero", episodes=2
    )
    # Two seams, six changes inside; the first chunk follows no other.
    actions = [0, 0, 0, 1, 2, 3, 4, 502, 503, 504, 802]
    assert result.safe_ticks == 4
    smooth, width = result.smoothness, 2e4
    assert (smooth.seam_jump.count, smooth.inside_jump.count) == (4, 12)
    assert smooth.seam_jump.mean == pytest.approx((498 + 298) / 2 / width)
    assert smooth.inside_jump.p95 == pytest.approx(1 / width)
    # Third differences from the chunk's first action on: two of 0, then 497, -994, ... that touch a seam.
    thirds = np.abs(np.diff(actions, n=3))[4:]
    assert smooth.seam_jerk.mean == pytest.approx(thirds.mean() / width * task().control_hz ** 3)
    assert (smooth.seam_jerk.count, smooth.inside_jerk.count) == (8, 4)
    assert smooth.inside_jerk.mean == pytest.approx(0, abs=1e-9)


def test_a_straight_line_has_changes_and_no_jerk():
    line = np.linspace([0.0, 0.0], [1.0, 2.0], 11)
    found = smoothness([(line, np.repeat([0, 1], [5, 6]))], np.array([1.0, 2.0]), 0.1)
    assert found.seam_jump.mean == pytest.approx(0.1)
    assert found.inside_jump.mean == pytest.approx(0.1)
    assert found.seam_jerk.p95 == pytest.approx(0, abs=1e-9)
    assert (found.seam_jerk.count, found.inside_jerk.count) == (3, 5)


def test_a_guided_sampler_takes_the_rest_of_the_chunk():
    model = TransformerConfig(width=16, depth=1, num_heads=2)
    config = PolicyConfig({"name": "flow_matching"}, model, {"observation": (1,)}, 1, 1, 8, 8)
    policy = FlowPolicy(config).eval()
    guided = build_sampler(policy, num_steps=2, guidance={"name": "prefix"})
    prefixes = []
    compute = guided.compute

    def kept(observation, noise, **options):
        prefixes.append(options.get("prefix"))
        return compute(observation, noise, **options)

    guided.compute = kept
    run_delayed(guided, task(), strategy="rtc", delay=2, episodes=1)
    assert prefixes[0] is None or not np.any(prefixes[0][1])
    assert all(np.any(weights) for _, weights in prefixes[1:])
    assert len(prefixes) > 2
    with pytest.raises(ConfigError, match="guidance="):
        run_delayed(policy, task(), strategy="rtc", delay=2, episodes=1)


def test_what_cannot_be_run_is_refused_in_one_sentence():
    for settings, said in (
        ({"strategy": "swich"}, "strategy"),
        ({"delay": -1}, "delay"),
        ({"delay": []}, "delay"),
        ({"delay": 1.5}, "delay"),
        ({"delay": lambda generator: -1}, "delay"),
        ({"delay": 5}, "max\\(execute_horizon, delay\\)"),
        ({"execute_horizon": 9}, "execute_horizon"),
        ({"execute_horizon": 0}, "execute_horizon"),
        ({"safe_action": "stop"}, "safe_action"),
        ({"safe_action": [0.0, 1.0]}, "safe_action"),
        ({"episodes": 0}, "episodes"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_delayed(
                CountingPolicy(), task(), **{"strategy": "switch", "delay": 1, "episodes": 1, **settings}
            )
    with pytest.raises(ConfigError, match="guidance="):
        run_delayed(NoisyPolicy(), task(), strategy="rtc", delay=1, episodes=1)

    class Broken(CountingPolicy):
        def act(self, observations, **settings):
            return super().act(observations, **settings) * float("nan")

    with pytest.raises(FlowPolicyError, match="NaN"):
        run_delayed(Broken(), task(), strategy="switch", delay=1, episodes=1)

"""Open-loop evaluation on recordings of which the right answers are known."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowpolicy import FlowPolicy
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import DataError
from flowpolicy.evaluation.open_loop import HOLD, METHODS, NEAREST, POLICY, evaluate_open_loop
from flowpolicy.features import Depth, Image, Vector
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy.config import PolicyConfig

LENGTHS = [9, 14, 6, 11, 8]


def recording(constant: bool = False) -> Demonstrations:
    """Actions are three times the observation, which says where in the episode one is, one a step."""
    steps = np.concatenate([np.arange(length) for length in LENGTHS]).astype(np.float32)
    observation = np.stack([steps, np.zeros_like(steps)], 1)
    action = np.stack([3 * steps, np.full_like(steps, 7) if constant else -steps], 1)
    arrays = {"observation": observation, "action": action}
    return Demonstrations(arrays, np.cumsum(LENGTHS), {"dimension_names": {"action": ["lift", "grip"]}})


def policy_of(demos: Demonstrations, **features) -> FlowPolicy:
    torch.manual_seed(0)
    config = PolicyConfig(
        objective={"name": "flow_matching"},
        model=TransformerConfig(width=8, depth=1, num_heads=2),
        observations={"observation": Vector((2,)), **features},
        action_dim=2, obs_horizon=2, action_horizon=4, execute_horizon=2,
    )  # fmt: skip
    policy = FlowPolicy(config)
    observation = {
        key: torch.from_numpy(array) for key, array in demos.arrays.items() if array.dtype == np.float32
    }
    policy.fit_normalizers(observation, torch.from_numpy(demos.arrays["action"]))
    return policy.eval()


class Oracle(FlowPolicy):
    """Knows the recording's rule, and adds an error."""

    error = 0.0

    def act(self, observations, **settings):
        ahead = observations["observation"][:, -1, :1] + torch.arange(4)
        return torch.stack([3 * ahead, -ahead], -1) + self.error


def test_a_perfect_policy_has_no_error_and_holding_falls_behind_by_the_steps_ahead():
    demos = recording()
    policy = policy_of(demos)
    oracle = Oracle(policy.config)
    oracle.load_state_dict(policy.state_dict())
    result = evaluate_open_loop(oracle, demos, [1, 3], [0, 2, 4])
    assert result.names == ("lift", "grip")
    assert result.error() == 0
    ahead = np.arange(1, 5)  # the action held is that of the step before
    np.testing.assert_allclose(result.by_step_and_dimension(HOLD), np.stack([3 * ahead, ahead], 1))
    span = 13 / 2  # of steps in the longest episode, to normalised units
    np.testing.assert_allclose(result.by_step(HOLD), ahead / span, rtol=1e-5)

    oracle.error = 0.5
    wrong = evaluate_open_loop(oracle, demos, [1, 3], [0, 2, 4])
    np.testing.assert_allclose(wrong.by_dimension(), 0.5)
    np.testing.assert_allclose(wrong.by_episode(), wrong.error())
    assert wrong.error(HOLD) == result.error(HOLD)


def test_the_nearest_neighbour_is_the_training_step_that_looks_alike_and_nothing_beyond_an_end_counts():
    demos = recording()
    result = evaluate_open_loop(policy_of(demos), demos, [0], [1])
    # Episode 1 is longer and has every observation of episode 0, but for those clamped at its beginning.
    assert result.error(NEAREST) == 0
    assert result.windows == LENGTHS[0] - 1  # before the first step there is no action to hold
    np.testing.assert_array_equal(result.counts[0], [8, 7, 6, 5])
    shorter = evaluate_open_loop(policy_of(demos), demos, [1], [2])
    assert shorter.error(NEAREST) > 0.1


def test_constant_dimensions_have_no_normalised_error_and_short_episodes_no_window():
    demos = recording(constant=True)
    result = evaluate_open_loop(policy_of(demos), demos, [0, 1], [2])
    assert result.inverse_scale[1] == 0
    assert result.inverse_scale[0] > 0
    assert np.isfinite(result.by_step()).all()
    single = Demonstrations(
        {key: array[[0, 1, 2, 3, 4]] for key, array in demos.arrays.items()}, [1, 5], {}, "single.zarr"
    )
    with pytest.raises(DataError, match=r"single\.zarr has no held-out episode of two steps"):
        evaluate_open_loop(policy_of(demos), single, [0], [1])
    assert evaluate_open_loop(policy_of(demos), single, [0, 1], [1]).episodes == (1,)


@pytest.mark.parametrize(
    ("feature", "dtype"),
    [
        (Image((40, 40, 3)), np.uint8),
        (Depth((40, 40), farthest=255.0), np.float32),
        (Vector((300,)), np.float32),
    ],
)
def test_images_and_other_large_observations_are_compared_as_thumbnails(feature, dtype):
    demos = recording()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sum(LENGTHS), *feature.shape)).astype(dtype)
    starts = demos.episode_starts
    images[: LENGTHS[0]] = images[starts[3] : starts[3] + LENGTHS[0]]  # episode 0 looks like the first of 3
    arrays = {**demos.arrays, "image": images, "observation": 0 * demos.arrays["observation"]}
    seen = replace(demos, arrays=arrays)
    policy = policy_of(seen, image=feature)
    assert evaluate_open_loop(policy, seen, [0], [1, 2, 3, 4]).error(NEAREST) == 0


def test_figures_agree_with_each_other_and_the_seed_decides(tmp_path):
    demos = recording()
    policy = policy_of(demos)
    first, again = (evaluate_open_loop(policy, demos, [1, 3, 4], [0, 2], seed=3) for _ in range(2))
    assert first.metrics() == again.metrics()
    assert evaluate_open_loop(policy, demos, [1, 3, 4], [0, 2], seed=4).error() != first.error()
    metrics = first.metrics()["open_loop"]
    assert metrics["episodes"] == 3
    assert metrics["dimensions"] == ["lift", "grip"]
    for method in METHODS:
        low, high = metrics[method]["error_ci95"]
        assert low <= metrics[method]["error"] <= high
        normalised = np.array(metrics[method]["by_dimension"]) * first.inverse_scale
        np.testing.assert_allclose(metrics[method]["by_dimension_normalised"], normalised)
    scalars = first.scalars()
    assert scalars["open_loop/error"] == metrics[POLICY]["error"]
    assert scalars["open_loop/error/grip"] == pytest.approx(metrics[POLICY]["by_dimension_normalised"][1])
    assert f"action error {first.error():.3g}" in first.sentence()
    rows = list(csv.DictReader(first.write_csv(tmp_path / "errors.csv").open()))
    assert len(rows) == len(METHODS) * 4 * 2
    (row,) = [row for row in rows if (row["method"], row["step"], row["dimension"]) == (HOLD, "2", "grip")]
    assert float(row["error"]) == pytest.approx(metrics[HOLD]["by_step"][2][1])


def test_both_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from flowpolicy.plots.open_loop import plot_errors, plot_trajectories

    demos = recording()
    result = evaluate_open_loop(policy_of(demos), demos, [1, 3], [0, 2, 4])
    trajectory = result.trajectory
    assert trajectory.starts.tolist() == list(range(0, LENGTHS[trajectory.episode], 2))
    assert trajectory.predicted.shape == (len(trajectory.starts), 4, 2)
    np.testing.assert_array_equal(trajectory.recorded[:, 0], 3 * np.arange(LENGTHS[trajectory.episode]))
    for plot in (plot_trajectories, plot_errors):
        path = plot(result, tmp_path / f"{plot.__name__}.png", control_hz=10.0, title="toy")
        assert path.stat().st_size > 10_000


def test_steps_that_are_not_learnt_are_neither_predicted_nor_neighbours():
    demos = recording()
    policy = policy_of(demos)
    oracle = Oracle(policy.config)
    oracle.load_state_dict(policy.state_dict())
    learnt = np.ones(demos.num_steps, bool)
    starts = demos.episode_starts
    learnt[starts[0] + 4 : starts[1]] = False
    demos.arrays["action"][~learnt] = 100  # what nobody should do
    result = evaluate_open_loop(oracle, demos, [0, 2], [1], learnt=learnt)
    assert result.error() == 0
    np.testing.assert_array_equal(result.counts[0], [3, 2, 1, 0])  # steps 1 to 3, up to step 3
    with pytest.raises(DataError, match="no held-out episode"):
        evaluate_open_loop(oracle, demos, [0], [1], learnt=np.zeros(demos.num_steps, bool))
